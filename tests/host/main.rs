//! Tests that need no GPU: one binary, because each one links the whole crate.

mod attention;
mod common;
mod kv_cache;
