//! `fulmen inspect`: what a checkpoint is, from its headers alone.

use anyhow::Result;
use clap::Args;
use serde_json::json;

use super::open::ModelArguments;
use super::print_line;
use crate::checkpoint::Checkpoint;
use crate::memory::pages::{Page, PagePlan, PageShape};
use crate::plan::{DEFAULT_PAGE_BYTES, ModelBytes};
use crate::request::chat_template::ChatTemplate;
use crate::request::tokenizer::Tokenizer;
use crate::units::human_bytes;

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    model: ModelArguments,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: Arguments) -> Result<u8> {
    let checkpoint = Checkpoint::open(&arguments.model.model)?;
    let summary = checkpoint.summary();
    // Tokenizer and template are told, not required: a bare checkpoint can be inspected too.
    let given = arguments.model.chat_template.as_deref();
    let tokenizer = Tokenizer::open(&arguments.model.model).map_err(|error| error.to_string());
    let template = tokenizer.as_ref().map_err(Clone::clone).and_then(|tokenizer| {
        ChatTemplate::open(&arguments.model.model, given, tokenizer.special_tokens()).map_err(|error| error.to_string())
    });
    if arguments.json {
        let mut value = serde_json::to_value(&summary)?;
        value["tokenizer_vocab"] = json!(tokenizer.as_ref().ok().map(Tokenizer::vocab_size));
        value["chat_template"] = json!(template.as_ref().ok().map(ChatTemplate::source));
        print_line(serde_json::to_string_pretty(&value)?)?;
        return Ok(super::OK);
    }
    print_line(summary)?;
    print_line(format_args!("{:<12}{}", "pages", pages(&checkpoint)))?;
    match &tokenizer {
        Ok(tokenizer) => print_line(format_args!("{:<12}{} entries", "tokenizer", tokenizer.vocab_size()))?,
        Err(error) => print_line(format_args!("{:<12}none: {error}", "tokenizer"))?,
    }
    match &template {
        Ok(template) => {
            print_line(format_args!("{:<12}{}\n{}", "template", template.origin(), template.source().trim_end()))?;
        }
        Err(error) => print_line(format_args!("{:<12}none: {error}", "template"))?,
    }
    Ok(super::OK)
}

/// How a layer's experts travel if none of them stays on the GPU.
fn pages(checkpoint: &Checkpoint) -> String {
    let shape = &checkpoint.config().shape;
    let plan = PagePlan::new(PageShape {
        experts: shape.experts,
        resident: 0,
        ring: 2 * shape.experts,
        matrix_bytes: ModelBytes::of(checkpoint.inventory()).matrix,
        page_bytes: DEFAULT_PAGE_BYTES,
        layers: shape.layers,
    });
    let pages: Vec<&Page> = plan.chunks().iter().flat_map(|chunk| &chunk.pages).collect();
    let largest = pages.iter().map(|page| page.bytes()).max().unwrap_or(0);
    format!("{} of up to {} bring a layer's experts", pages.len(), human_bytes(largest))
}
