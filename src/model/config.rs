//! config.json of a Hugging Face folder into [`ModelConfig`].
//!
//! In: the text of config.json as transformers 4 writes it (`rope_theta`, `rope_scaling`, `torch_dtype` at the top level)
//! or as transformers 5 does (`rope_parameters: {rope_theta, rope_type, …}`, `dtype`). Out: a [`ModelConfig`] in fulmen's
//! own terms, or a [`ConfigError`] that names every field that is missing or wrong.
//!
//! Guarantees: every number of a `ModelConfig` is within the bounds of [`Shape::faults`], so no product of axes overflows;
//! every token id is below V; any text gives a value or an error, never a panic. What would change the numbers and is
//! not implemented for the family (scaled rotary embedding, another activation, quantised weights) is refused, never ignored.
//!
//! Given up: fields that only matter for training, and fields that no supported family reads, are not looked at; of a
//! repeated key the last one counts, as in Python.

use std::fmt;
use std::fs::File;
use std::io::{self, Read};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::{Family, Forward, Shape, Yarn};

/// The largest config.json that is read. Real ones are about 1 KiB.
const MAX_CONFIG_BYTES: u64 = 1 << 20;

/// What config.json says, validated, in fulmen's terms.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    pub family: Family,
    pub shape: Shape,
    /// What the forward pass does otherwise than Mixtral's.
    pub forward: Forward,
    pub norm_eps: f32,
    pub rope_theta: f64,
    /// Keys further back than this many tokens are invisible (`i - window < j <= i`), in the layers that
    /// [`Forward::windowed_layers`] names. [`ModelConfig::window`] is what to ask.
    pub sliding_window: Option<usize>,
    /// Positions that the model was trained for.
    pub max_positions: usize,
    /// The LM head is the embedding table.
    pub tied_embeddings: bool,
    pub bos_token: Option<u32>,
    pub eos_tokens: Vec<u32>,
    /// The element type that config.json announces, as it spells it. For people: the files decide.
    pub declared_dtype: Option<String>,
}

impl ModelConfig {
    /// The same model with its first `layers` layers only.
    pub fn keep_layers(&mut self, layers: usize) {
        self.shape.layers = layers.min(self.shape.layers);
        self.forward.windowed_layers.truncate(layers);
    }

    /// Reads `config.json` in `dir`.
    pub fn open(dir: &Path) -> Result<ModelConfig, ConfigError> {
        let path = dir.join("config.json");
        let read = |source| ConfigError::Read { path: path.clone(), source };
        // Opening a pipe would wait for its writer.
        if !path.metadata().map_err(read)?.is_file() {
            return Err(read(io::Error::other("not a regular file")));
        }
        let mut text = Vec::new();
        File::open(&path).map_err(read)?.take(MAX_CONFIG_BYTES + 1).read_to_end(&mut text).map_err(read)?;
        if text.len() as u64 > MAX_CONFIG_BYTES {
            return Err(read(io::Error::other(format!("longer than {MAX_CONFIG_BYTES} bytes"))));
        }
        let text = String::from_utf8(text).map_err(|e| read(io::Error::new(io::ErrorKind::InvalidData, e)))?;
        ModelConfig::parse(&text)
    }

    /// Reads the text of a config.json.
    pub fn parse(text: &str) -> Result<ModelConfig, ConfigError> {
        let object: Map<String, Value> = serde_json::from_str(text).map_err(ConfigError::Json)?;
        let family = family(&object)?;
        let mut fields = Fields { object: &object, faults: Vec::new() };
        let config = family.read_config(&mut fields);

        let mut faults = fields.faults;
        match config {
            Some(config) if faults.is_empty() => {
                faults.extend(config.shape.faults().into_iter().map(ConfigFault::Shape));
                if faults.is_empty() {
                    return Ok(config);
                }
            }
            _ => {}
        }
        Err(ConfigError::Fields(ConfigFaults(faults)))
    }
}

impl ModelConfig {
    /// How far back a row of `layer` sees: that many tokens, its own among them. `None`: all.
    pub fn window(&self, layer: usize) -> Option<usize> {
        let windowed = self.forward.windowed_layers.get(layer).copied().unwrap_or(true);
        self.sliding_window.filter(|_| windowed)
    }

    /// What every layer leaves unseen: tokens further back than this. `None` if some layer sees all.
    pub fn widest_window(&self) -> Option<usize> {
        self.sliding_window.filter(|_| self.forward.windowed_layers.iter().all(|windowed| *windowed))
    }
}

/// The family that config.json names: by `architectures`, or by `model_type` where that is absent.
fn family(object: &Map<String, Value>) -> Result<Family, ConfigError> {
    let named = match object.get("architectures") {
        Some(Value::Array(names)) => {
            for family in Family::ALL {
                if names.iter().any(|name| name == family.architecture()) {
                    return Ok(family);
                }
            }
            format!("architectures {}", shown(&Value::Array(names.clone())))
        }
        None | Some(Value::Null) => {
            let model_type = object.get("model_type").unwrap_or(&Value::Null);
            if let Some(family) = Family::ALL.into_iter().find(|family| model_type == family.name()) {
                return Ok(family);
            }
            format!("no architectures, model_type {}", shown(model_type))
        }
        Some(other) => format!("architectures {}", shown(other)),
    };
    Err(ConfigError::UnsupportedArchitecture { named })
}

/// Why a config.json gives no [`ModelConfig`].
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    #[error("{}: {source}", path.display())]
    Read { path: PathBuf, source: io::Error },
    #[error("config.json: not a JSON object: {0}")]
    Json(#[source] serde_json::Error),
    #[error("config.json: {named} is not supported (supported: {})", supported())]
    UnsupportedArchitecture { named: String },
    /// Every field that is missing or wrong.
    #[error("{0}")]
    Fields(ConfigFaults),
}

fn supported() -> String {
    Family::ALL.map(Family::architecture).join(", ")
}

/// All that is wrong with the fields of one config.json. Never empty.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ConfigFaults(pub Vec<ConfigFault>);

impl fmt::Display for ConfigFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let [fault] = &self.0[..] {
            return write!(f, "config.json: {fault}");
        }
        write!(f, "config.json: {} faults", self.0.len())?;
        self.0.iter().try_for_each(|fault| write!(f, "\n  {fault}"))
    }
}

/// One thing that is wrong with a config.json.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ConfigFault {
    #[error("{field} is missing")]
    Missing { field: String },
    #[error("{field} needs {needed}, has {had}")]
    Invalid { field: String, needed: String, had: String },
    /// The fields are fine one by one and not together.
    #[error("{0}")]
    Shape(String),
}

/// config.json while a family reads it. A method that finds no good value records why and returns `None`; the reading
/// goes on, so that all faults come out together. A field inside another is written `outer.inner`.
pub(super) struct Fields<'a> {
    object: &'a Map<String, Value>,
    faults: Vec<ConfigFault>,
}

impl<'a> Fields<'a> {
    /// The value at `field`; null is as good as absent.
    fn get(&self, field: &str) -> Option<&'a Value> {
        let mut steps = field.split('.');
        let first = self.object.get(steps.next()?)?;
        steps.try_fold(first, |value, step| value.get(step)).filter(|value| !value.is_null())
    }

    fn required(&mut self, field: &str) -> Option<&'a Value> {
        let value = self.get(field);
        if value.is_none() {
            self.faults.push(ConfigFault::Missing { field: field.to_owned() });
        }
        value
    }

    fn invalid<T>(&mut self, field: &str, needed: impl Into<String>, had: impl Into<String>) -> Option<T> {
        self.faults.push(ConfigFault::Invalid { field: field.to_owned(), needed: needed.into(), had: had.into() });
        None
    }

    fn axis_value(&mut self, field: &str, value: &Value) -> Option<usize> {
        match value.as_u64() {
            Some(extent @ 1..) if extent <= Shape::MAX_AXIS as u64 => Some(extent as usize),
            _ => self.invalid(field, format!("an integer from 1 to {}", Shape::MAX_AXIS), shown(value)),
        }
    }

    /// The extent of an axis: 1 to [`Shape::MAX_AXIS`].
    pub fn axis(&mut self, field: &str) -> Option<usize> {
        let value = self.required(field)?;
        self.axis_value(field, value)
    }

    /// The extent of an axis that has several names; the first one that is there counts.
    pub fn axis_of(&mut self, names: &[&str]) -> Option<usize> {
        let given = names.iter().find(|name| self.get(name).is_some());
        self.axis(given.unwrap_or(&names[0]))
    }

    /// Like [`Fields::axis`]; absent is `Some(None)`.
    pub fn optional_axis(&mut self, field: &str) -> Option<Option<usize>> {
        match self.get(field) {
            None => Some(None),
            Some(value) => self.axis_value(field, value).map(Some),
        }
    }

    /// K: as given, or D / H where it is absent.
    pub fn head_width(&mut self, field: &str, d_model: Option<usize>, q_heads: Option<usize>) -> Option<usize> {
        if let Some(given) = self.optional_axis(field)? {
            return Some(given);
        }
        self.head_share(field, d_model, q_heads)
    }

    /// D / H, for a family that has nothing else; `field` is named if that is no whole number.
    pub fn head_share(&mut self, field: &str, d_model: Option<usize>, q_heads: Option<usize>) -> Option<usize> {
        let (d_model, q_heads) = (d_model?, q_heads?); // Their own faults are recorded.
        if !d_model.is_multiple_of(q_heads) {
            let needed = format!("a number, because {q_heads} query heads do not divide a model width of {d_model}");
            return self.invalid(field, needed, "none");
        }
        Some(d_model / q_heads)
    }

    /// The epsilon of the norms: above 0, at most 1.
    pub fn norm_eps(&mut self, field: &str) -> Option<f32> {
        let value = self.required(field)?;
        match value.as_f64().map(|eps| eps as f32) {
            Some(eps) if eps > 0.0 && eps <= 1.0 => Some(eps),
            _ => self.invalid(field, "a number above 0 (in f32) and up to 1", shown(value)),
        }
    }

    /// The base of the rotary embedding, from either generation's place; whatever scales it is refused.
    pub fn rope_theta(&mut self) -> Option<f64> {
        self.rope_theta_below("rope_theta")
    }

    /// Likewise, where transformers 4 has it at `outer_field`.
    pub fn rope_theta_below(&mut self, outer_field: &str) -> Option<f64> {
        let before = self.faults.len();
        self.rope_is("default");
        // transformers 4 spelt it `type` first and `rope_type` later, and has no scaling without one of them.
        if let Some(scaling) = self.get("rope_scaling")
            && self.get("rope_scaling.rope_type").or(self.get("rope_scaling.type")).is_none()
        {
            self.invalid::<()>("rope_scaling", "null or rope_type \"default\"", shown(scaling));
        }
        let theta = self.theta(outer_field);
        theta.filter(|_| self.faults.len() == before)
    }

    /// Records whatever says that the rotary embedding is of another type, or of part of a head.
    fn rope_is(&mut self, rope_type: &str) {
        for field in
            ["rope_parameters.rope_type", "rope_parameters.type", "rope_scaling.rope_type", "rope_scaling.type"]
        {
            self.only(field, &[rope_type]);
        }
        self.rotates_whole_heads("rope_parameters.partial_rotary_factor");
        self.rotates_whole_heads("partial_rotary_factor");
    }

    fn theta(&mut self, outer_field: &str) -> Option<f64> {
        let outer = self.get(outer_field);
        let inner = self.get("rope_parameters.rope_theta");
        match (outer, inner) {
            (Some(outer), Some(inner)) if outer.as_f64() != inner.as_f64() => {
                let needed = format!("the value of {outer_field}, {}", shown(outer));
                self.invalid("rope_parameters.rope_theta", needed, shown(inner))
            }
            (_, Some(inner)) => self.theta_value("rope_parameters.rope_theta", inner),
            (Some(outer), None) => self.theta_value(outer_field, outer),
            (None, None) => {
                let field =
                    if self.get("rope_parameters").is_some() { "rope_parameters.rope_theta" } else { outer_field };
                self.required(field).and(None)
            }
        }
    }

    /// The base of a rotary embedding that YaRN may scale, and how: `rope_scaling` of transformers 4, `rope_parameters` of 5.
    pub fn rope_with_yarn(&mut self) -> Option<(f64, Option<Yarn>)> {
        let place = if self.get("rope_scaling").is_some() { "rope_scaling" } else { "rope_parameters" };
        let field = |name: &str| format!("{place}.{name}");
        let rope_type = self.get(&field("rope_type")).or(self.get(&field("type")));
        if rope_type.and_then(Value::as_str) != Some("yarn") {
            return self.rope_theta().map(|theta| (theta, None));
        }
        let before = self.faults.len();
        self.rope_is("yarn");
        let theta = self.theta("rope_theta");
        for name in ["mscale", "mscale_all_dim"] {
            if let Some(value) = self.get(&field(name)) {
                self.invalid::<()>(&field(name), "to be absent (nothing else is supported)", shown(value));
            }
        }
        let factor = self.positive(&field("factor"), None);
        let beta_fast = self.positive(&field("beta_fast"), Some(32.0));
        let beta_slow = self.positive(&field("beta_slow"), Some(1.0));
        let original_positions = self.positive(&field("original_max_position_embeddings"), None);
        let truncate = self.flag(&field("truncate"), true);
        let default = factor.map_or(1.0, Yarn::default_attention_factor);
        let attention_factor = self.positive(&field("attention_factor"), Some(default));
        if theta.is_some_and(|theta| theta <= 1.0) {
            self.invalid::<()>("rope_theta", "a number above 1 for YaRN", "1");
        }
        let yarn = Yarn {
            factor: factor?,
            beta_fast: beta_fast?,
            beta_slow: beta_slow?,
            original_positions: original_positions?,
            truncate: truncate?,
            attention_factor: attention_factor?,
        };
        theta.filter(|_| self.faults.len() == before).map(|theta| (theta, Some(yarn)))
    }

    /// A number above 0, at most 1e15; `default` where absent, if there is one.
    fn positive(&mut self, field: &str, default: Option<f64>) -> Option<f64> {
        let value = match (self.get(field), default) {
            (None, Some(default)) => return Some(default),
            (None, None) => self.required(field)?,
            (Some(value), _) => value,
        };
        match value.as_f64() {
            Some(number) if number > 1e-6 && number <= 1e15 => Some(number),
            _ => self.invalid(field, "a number above 1e-6 and up to 1e15", shown(value)),
        }
    }

    /// A limit above 0 within which values are clamped; absent is `Some(None)`.
    pub fn optional_clip(&mut self, field: &str) -> Option<Option<f32>> {
        match self.get(field) {
            None => Some(None),
            Some(_) => self.positive(field, None).map(|limit| Some(limit as f32)),
        }
    }

    /// Which layers have the sliding window, by transformers' names; where absent, every other one from the first on.
    pub fn windowed_layers(&mut self, field: &str, layers_field: &str) -> Option<Vec<bool>> {
        let layers =
            self.get(layers_field).and_then(Value::as_u64).filter(|layers| *layers <= Shape::MAX_AXIS as u64)?;
        let Some(value) = self.get(field) else {
            return Some((0..layers).map(|layer| layer % 2 == 0).collect());
        };
        let window = |name: &Value| match name.as_str() {
            Some("sliding_attention") => Some(true),
            Some("full_attention") => Some(false),
            _ => None,
        };
        let listed = value.as_array().and_then(|names| names.iter().map(window).collect::<Option<Vec<bool>>>());
        match listed {
            Some(listed) if listed.len() as u64 == layers => Some(listed),
            _ => {
                let needed = format!("\"sliding_attention\" or \"full_attention\" for each of {layers} layers");
                self.invalid(field, needed, shown(value))
            }
        }
    }

    /// Refuses an axis that is no multiple of `unit`; its other faults are the reader's.
    pub fn multiple_of(&mut self, field: &str, unit: usize) {
        if let Some(value) = self.get(field)
            && value.as_u64().is_some_and(|extent| !extent.is_multiple_of(unit as u64))
        {
            self.invalid::<()>(field, format!("a multiple of {unit}, the block of MXFP4"), shown(value));
        }
    }

    /// Refuses a flag that is not `supported`; absent is fine (the family's default).
    pub fn only_flag(&mut self, field: &str, supported: bool) {
        if let Some(value) = self.get(field)
            && *value != Value::Bool(supported)
        {
            self.invalid::<()>(field, format!("{supported} (nothing else is supported)"), shown(value));
        }
    }

    /// Refuses every number but `supported`; absent is fine (the family's default).
    pub fn only_number(&mut self, field: &str, supported: u32) {
        if let Some(value) = self.get(field)
            && value.as_f64() != Some(supported.into())
        {
            self.invalid::<()>(field, format!("{supported} (nothing else is supported)"), shown(value));
        }
    }

    /// Refuses a list with anything in it; absent is fine.
    pub fn empty_list(&mut self, field: &str) {
        if let Some(value) = self.get(field)
            && value.as_array().is_none_or(|list| !list.is_empty())
        {
            self.invalid::<()>(field, "[] (nothing else is supported)", shown(value));
        }
    }

    /// The order of the norm by which weights are divided, of which only 1, their sum, is supported: true; null: they are not
    /// divided, false. Absent is 1.
    pub fn divides_by_sum(&mut self, group: &str, field: &str) -> Option<bool> {
        match self.get(group).and_then(|group| group.get(field)) {
            None => Some(true),
            Some(Value::Null) => Some(false),
            Some(value) if value.as_f64() == Some(1.0) => Some(true),
            Some(value) => {
                self.invalid(&format!("{group}.{field}"), "1 or null (nothing else is supported)", shown(value))
            }
        }
    }

    fn theta_value(&mut self, field: &str, value: &Value) -> Option<f64> {
        match value.as_f64() {
            Some(theta) if (1.0..=1e15).contains(&theta) => Some(theta),
            _ => self.invalid(field, "a number from 1 to 1e15", shown(value)),
        }
    }

    fn rotates_whole_heads(&mut self, field: &str) {
        if let Some(value) = self.get(field)
            && value.as_f64() != Some(1.0)
        {
            self.invalid::<()>(field, "1 (nothing else is supported)", shown(value));
        }
    }

    fn token_value(&mut self, field: &str, value: &Value, vocab: Option<usize>) -> Option<u32> {
        let limit = vocab.unwrap_or(Shape::MAX_AXIS);
        match value.as_u64() {
            Some(id) if id < limit as u64 => Some(id as u32), // MAX_AXIS is below 2^32.
            _ => self.invalid(field, format!("a token id below {limit} (the vocabulary)"), shown(value)),
        }
    }

    /// A token id; absent is `Some(None)`.
    pub fn optional_token(&mut self, field: &str, vocab: Option<usize>) -> Option<Option<u32>> {
        match self.get(field) {
            None => Some(None),
            Some(value) => self.token_value(field, value, vocab).map(Some),
        }
    }

    /// A token id or a list of them; absent is an empty list.
    pub fn tokens(&mut self, field: &str, vocab: Option<usize>) -> Option<Vec<u32>> {
        match self.get(field) {
            None => Some(Vec::new()),
            Some(Value::Array(values)) => {
                // Not `collect` into an Option: that would stop at the first fault.
                let ids: Vec<_> = values.iter().map(|value| self.token_value(field, value, vocab)).collect();
                ids.into_iter().collect()
            }
            Some(value) => self.token_value(field, value, vocab).map(|id| vec![id]),
        }
    }

    /// true or false; `default` where absent.
    pub fn flag(&mut self, field: &str, default: bool) -> Option<bool> {
        match self.get(field) {
            None => Some(default),
            Some(Value::Bool(flag)) => Some(*flag),
            Some(value) => self.invalid(field, "true or false", shown(value)),
        }
    }

    /// Refuses every value but these; absent is fine (the family's default is the first of them).
    pub fn only(&mut self, field: &str, supported: &[&str]) {
        if let Some(value) = self.get(field)
            && !supported.iter().any(|name| value == name)
        {
            self.invalid::<()>(field, format!("{supported:?} (nothing else is supported)"), shown(value));
        }
    }

    /// `dtype` of transformers 5, `torch_dtype` of transformers 4.
    pub fn declared_dtype(&self) -> Option<String> {
        let name = self.get("dtype").or(self.get("torch_dtype"))?.as_str()?;
        Some(name.strip_prefix("torch.").unwrap_or(name).to_owned())
    }

    /// Whether experts are MXFP4; any other quantisation is refused.
    pub fn is_mxfp4(&mut self) -> bool {
        if self.get("quantization_config.quant_method").is_some_and(|method| method == "mxfp4") {
            return true;
        }
        self.refuse_quantised_weights();
        false
    }

    pub fn refuse_quantised_weights(&mut self) {
        if let Some(value) = self.get("quantization_config") {
            let method = value.get("quant_method").unwrap_or(value);
            let needed = "to be absent (weights must be bf16, f16 or f32)";
            self.invalid::<()>("quantization_config", needed, shown(method));
        }
    }
}

/// A JSON value for a message: on one line, not longer than a line.
fn shown(value: &Value) -> String {
    const MAX_CHARS: usize = 80;
    // What a terminal would obey stays out of messages; JSON itself escapes only the controls below 32.
    let text = value.to_string().replace(char::is_control, "\u{fffd}");
    match text.char_indices().nth(MAX_CHARS) {
        None => text,
        Some((end, _)) => format!("{}…", &text[..end]),
    }
}
