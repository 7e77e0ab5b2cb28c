//! Everything that needs no GPU, as one binary: bytes, plans, schedules, shaders as text, CPU attention.

mod attention;
mod batcher;
mod checkpoint;
mod common;
mod config;
mod families;
mod fixtures;
mod kv_cache;
mod pages;
mod plan;
mod plan_paper;
mod profile;
mod request_batch_file;
mod request_chat_template;
mod request_extract;
mod request_sampler;
mod request_tokenizer;
mod schedule;
mod search;
mod shaders;
mod simulate;
mod small_tokenizers;
mod synthetic;
mod timeline;
mod units;
