//! generation_config.json: what the checkpoint's makers recommend.

use std::path::{Path, PathBuf};

use serde_json::Value;

use super::fields::{Fault, Fields, invalid, token_ids};
use super::line::{Body, CompletionsBody, Prompt, SamplingFields};
use crate::request::chat_template::kind;
use crate::request::tokenizer::{TokenizerError, read_json};

/// generation_config.json: what the checkpoint's makers recommend, and what ends a completion.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct GenerationDefaults {
    /// 0 where the file says `do_sample: false`, whose other sampling numbers then mean nothing.
    pub temperature: Option<f32>,
    pub top_k: Option<usize>,
    pub top_p: Option<f32>,
    pub min_p: Option<f32>,
    pub repetition_penalty: Option<f32>,
    pub max_new_tokens: Option<usize>,
    /// Together with config.json's, the tokens that end a completion.
    pub eos_token_ids: Vec<u32>,
    /// The run's seed, for requests that have none. Not in the file.
    pub seed: u64,
}

/// generation_config.json is there and unusable.
#[derive(Debug, thiserror::Error)]
pub enum GenerationConfigError {
    #[error(transparent)]
    File(#[from] TokenizerError),
    #[error("{path}: {message}")]
    Invalid { path: PathBuf, message: String },
}

impl GenerationDefaults {
    /// Reads a folder's generation_config.json; without one, no defaults. Fields for other ways of generating
    /// (`num_beams`, `max_length`, …) are not fulmen's to judge, as this is the makers' file and not the user's.
    pub fn open(folder: &Path) -> Result<Self, GenerationConfigError> {
        let path = folder.join("generation_config.json");
        let Some(value) = read_json(&path)? else { return Ok(Self::default()) };
        Self::from_json(value).map_err(|message| GenerationConfigError::Invalid { path, message })
    }

    /// From the parsed file.
    pub fn from_json(value: Value) -> Result<Self, String> {
        let Value::Object(map) = value else {
            return Err(format!("needs a JSON object, is {}", kind(&value)));
        };
        Self::from_fields(Fields(map)).map_err(|fault| fault.message)
    }

    fn from_fields(mut fields: Fields) -> Result<Self, Fault> {
        let eos_token_ids = match fields.take("eos_token_id") {
            None => Vec::new(),
            Some(Value::Array(ids)) => token_ids("eos_token_id", &ids)?,
            Some(id) => token_ids("eos_token_id", std::slice::from_ref(&id))?,
        };
        let mut defaults = Self {
            temperature: fields.number("temperature")?,
            top_k: fields.count("top_k")?,
            top_p: fields.number("top_p")?,
            min_p: fields.number("min_p")?,
            repetition_penalty: fields.number("repetition_penalty")?,
            max_new_tokens: fields.count("max_new_tokens")?,
            eos_token_ids,
            seed: 0,
        };
        if fields.boolean("do_sample")? == Some(false) {
            defaults.temperature = Some(0.0);
            (defaults.top_k, defaults.top_p, defaults.min_p) = (None, None, None);
        }
        let nothing_said = SamplingFields::default();
        let body = CompletionsBody {
            model: None,
            prompt: Prompt::Tokens(Vec::new()),
            echo: false,
            add_special_tokens: true,
            sampling: nothing_said,
        };
        match Body::Completions(body).to_sampling(&defaults) {
            Ok(_) => Ok(defaults),
            Err(message) => invalid(message),
        }
    }
}
