//! `fulmen synthesize`: a checkpoint of made-up weights as files.

use std::path::PathBuf;

use anyhow::Result;
use clap::Args;

use super::bench::shape;
use super::progress::LoadProgress;
use crate::checkpoint::Synthetic;

#[derive(Debug, Args)]
pub struct Arguments {
    /// A published shape of the Mixtral family (mixtral-8x7b, mixtral-8x22b), or mixtral-tiny
    shape: String,
    /// Layers to keep [default: the shape's]
    #[arg(long, value_name = "N")]
    layers: Option<usize>,
    /// Folder to make
    #[arg(short, long, value_name = "FOLDER")]
    output: PathBuf,
}

pub fn run(arguments: Arguments) -> Result<u8> {
    let synthetic = Synthetic::new(shape(&arguments.shape, arguments.layers)?);
    let mut progress = LoadProgress::named("writing");
    synthetic.write(&arguments.output, &mut |done, total| progress.update(done, total))?;
    progress.finish();
    Ok(super::OK)
}
