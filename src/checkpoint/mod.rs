//! A Hugging Face folder, validated and mapped.

pub mod dtype;

pub use dtype::Dtype;
