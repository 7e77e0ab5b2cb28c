//! Who owns which bytes, and when they may be reused.

pub mod kv_cache;
