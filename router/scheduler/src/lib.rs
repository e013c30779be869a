//! Decides what every step computes and which KV-cache blocks it uses.
