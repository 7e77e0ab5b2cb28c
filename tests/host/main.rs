//! Everything that needs no GPU: bytes, plans, schedules, shaders as text, CPU attention.

mod request_batch_file;
mod request_chat_template;
mod request_extract;
mod request_sampler;
mod request_tokenizer;
mod small_tokenizers;
