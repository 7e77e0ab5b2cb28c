//! The batch file: requests in, results out, one JSON object a line (the OpenAI Batch dialect).
//!
//! ```text
//! {"custom_id":"a","method":"POST","url":"/v1/completions","body":{"prompt":"Hi","max_tokens":8}}           in
//! {"id":"batch_req_…","custom_id":"a","response":{"status_code":200,"request_id":"…","body":{…}},"error":null}      out
//! {"id":"batch_req_…","custom_id":"b","response":null,"error":{"code":"…","message":"…","line":2}}                  out
//! ```
//!
//! In: bytes from anywhere ([`BatchReader`]), the checkpoint's generation_config.json ([`GenerationDefaults`]). Out:
//! [`BatchLine`]s to be made [`Request`](crate::request::Request)s, and [`OutputLine`]s appended by a [`ResultWriter`] in the order in which they
//! finish. `/v1/chat/completions` and `/v1/completions` may be mixed in one file; without `url` the body tells which is
//! meant; any `model` is accepted, and the one that answered is reported.
//!
//! Guarantees:
//! - A bad line becomes an error line with its number; the others run. No bytes make the reader panic or keep more than
//!   one line (of at most [`MAX_LINE_BYTES`]) and 16 bytes per `custom_id`.
//! - **Nothing is ignored**: a field that fulmen does not know, or cannot honour, is an error that names it. Exceptions:
//!   values that ask for nothing (`"stream": false`, `"tools": []`, null for a known field) and labels for the
//!   provider's books (`user`, `metadata`, `safety_identifier`, `prompt_cache_key`).
//! - Results survive a killed process: each line is one write, the disk is synchronised every few seconds, and
//!   [`Existing::Resume`] reads back what is finished and removes a torn last line. An error line counts as finished.
//! - The same request gives the same line, but for `created`: ids are hashes of the `custom_id`.
//!
//! Given up: a list of several prompts in one line (write one line for each), files with both the same `custom_id` twice
//! in *different* shards (each shard sees its own lines), and keys repeated within one JSON object (the last one counts,
//! as in Python).

mod defaults;
mod fields;
mod line;
mod output;
mod reader;
mod writer;

pub use defaults::{GenerationConfigError, GenerationDefaults};
pub use line::{
    BatchLine, Body, ChatBody, CompletionsBody, Endpoint, LineError, LineErrorCode, Prompt, SamplingFields,
};
pub use output::{
    ChatAnswer, ChatChoice, ChatLogprob, ChatLogprobs, OutputError, OutputLine, Response, ResponseBody, ResponseOf,
    StopReasonJson, TextChoice, TextLogprobs, TopLogprob, Usage, now_seconds,
};
pub use reader::{BatchReadError, BatchReader, Finished, ReadOptions, Shard, Validation, validate_all};
pub use writer::{Existing, ResultWriter, WriterError};

/// A longer line is an error line.
pub const MAX_LINE_BYTES: usize = 64 << 20;
