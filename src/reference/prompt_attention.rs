//! Attention of prompt rows: each row is attended on its own, as if it were the last token of its context.

pub use super::paged_attention::{PagedRow, paged_attention as prompt_attention};
