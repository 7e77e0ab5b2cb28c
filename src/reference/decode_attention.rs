//! Attention of decode rows: the last token of each context.

pub use super::paged_attention::{PagedRow, paged_attention as decode_attention};
