//! `fulmen inspect`: what a checkpoint is, from its headers alone; or what a published one would be, by name.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;
use serde_json::json;

use super::bench::shape;
use super::print_line;
use crate::checkpoint::{Checkpoint, Inventory, Summary, Synthetic, Weights};
use crate::memory::pages::{Page, PagePlan, PageShape};
use crate::plan::{DEFAULT_PAGE_BYTES, ModelBytes};
use crate::request::chat_template::ChatTemplate;
use crate::request::tokenizer::Tokenizer;
use crate::units::human_bytes;

#[derive(Debug, Args)]
pub struct Arguments {
    /// Folder of a Hugging Face checkpoint (config.json, *.safetensors, tokenizer.json)
    #[arg(short, long, visible_aliases = ["model-path", "model-id"], env = "FULMEN_MODEL", value_name = "FOLDER", required_unless_present = "synthetic")]
    model: Option<PathBuf>,
    /// A published shape by name instead, e.g. dbrx: what its checkpoint holds, without one
    #[arg(long, value_name = "SHAPE", conflicts_with_all = ["model", "chat_template"])]
    synthetic: Option<String>,
    /// Jinja template for chat messages, a file or the template itself [default: the checkpoint's]
    #[arg(long, env = "FULMEN_CHAT_TEMPLATE", value_name = "FILE|TEXT")]
    chat_template: Option<String>,
    /// One JSON object instead of text
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: Arguments) -> Result<u8> {
    let weights = match (&arguments.model, &arguments.synthetic) {
        (_, Some(name)) => Weights::Synthetic(Synthetic::new(shape(name, None)?)),
        (Some(folder), None) => Weights::Files(Checkpoint::open(folder)?),
        (None, None) => unreachable!("one of them is required"),
    };
    let summary = Summary::new(weights.inventory());
    let Some(folder) = arguments.model.filter(|_| arguments.synthetic.is_none()) else {
        if arguments.json {
            print_line(serde_json::to_string_pretty(&summary)?)?;
        } else {
            print_line(summary)?;
            print_line(format_args!("{:<12}{}", "pages", pages(weights.inventory())))?;
        }
        return Ok(super::OK);
    };
    // Tokenizer and template are told, not required: a bare checkpoint can be inspected too.
    let given = arguments.chat_template.as_deref();
    let tokenizer = Tokenizer::open(&folder).map_err(|error| error.to_string());
    let template = tokenizer.as_ref().map_err(Clone::clone).and_then(|tokenizer| {
        ChatTemplate::open(&folder, given, tokenizer.special_tokens()).map_err(|error| error.to_string())
    });
    if arguments.json {
        let mut value = serde_json::to_value(&summary)?;
        value["tokenizer_vocab"] = json!(tokenizer.as_ref().ok().map(Tokenizer::vocab_size));
        value["chat_template"] = json!(template.as_ref().ok().map(ChatTemplate::source));
        print_line(serde_json::to_string_pretty(&value)?)?;
        return Ok(super::OK);
    }
    print_line(summary)?;
    print_line(format_args!("{:<12}{}", "pages", pages(weights.inventory())))?;
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
fn pages(inventory: &Inventory) -> String {
    let shape = &inventory.config().shape;
    let plan = PagePlan::new(PageShape {
        experts: shape.experts,
        resident: 0,
        extra: 0,
        ring: 2 * shape.experts,
        matrix_bytes: ModelBytes::of(inventory).matrix,
        page_bytes: DEFAULT_PAGE_BYTES,
        layers: shape.layers,
    });
    let pages: Vec<&Page> = plan.chunks().iter().flat_map(|chunk| &chunk.pages).collect();
    let largest = pages.iter().map(|page| page.bytes()).max().unwrap_or(0);
    format!("{} of up to {} bring a layer's experts", pages.len(), human_bytes(largest))
}
