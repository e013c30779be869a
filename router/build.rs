//! Generates the Rust side of `proto/shard.proto`, without a system `protoc`.

fn main() -> anyhow::Result<()> {
    println!("cargo::rerun-if-changed=../proto/shard.proto");
    let files = protox::compile(["../proto/shard.proto"], ["../proto"])?;
    tonic_prost_build::configure().compile_fds(files)?;
    Ok(())
}
