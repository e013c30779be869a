//! The shards as the driver sees them, and the protobuf types that stay in here.

/// Generated from `proto/shard.proto`.
#[allow(missing_docs, clippy::all, clippy::unwrap_used)]
pub mod proto {
    tonic::include_proto!("text_generation.shard.v1");
}
