//! Starts, watches and restarts the shards and the router.
