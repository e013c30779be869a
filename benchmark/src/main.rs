//! Load generator, stub shard and null server.
fn main() {}
