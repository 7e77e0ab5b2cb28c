//! Who owns which bytes, and when they may be reused.

pub mod host_memory;
pub mod kv_cache;
pub mod page_source;
pub mod pages;
