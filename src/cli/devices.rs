//! `fulmen devices`: the adapters that answer.

use anyhow::{Result, bail};
use clap::Args;

use super::print_line;
use crate::gpu::{GpuError, list_adapters};
use crate::units::human_bytes;

#[derive(Debug, Args)]
pub struct Arguments {
    /// One JSON array instead of text
    #[arg(long)]
    json: bool,
}

pub fn run(arguments: Arguments) -> Result<u8> {
    let adapters = list_adapters();
    if adapters.is_empty() {
        bail!(GpuError::NoAdapter);
    }
    if arguments.json {
        print_line(serde_json::to_string_pretty(&adapters)?)?;
        return Ok(super::OK);
    }
    for adapter in adapters {
        let (index, name, kind, backend) = (adapter.index, &adapter.name, &adapter.kind, &adapter.backend);
        print_line(format_args!("{index}: {name}  ({kind}, {backend}, {})", adapter.driver))?;
        print_line(format_args!(
            "   largest binding {}, largest buffer {}, workgroup memory {}, subgroups {}..{}{}{}",
            human_bytes(adapter.max_binding_bytes),
            human_bytes(adapter.max_buffer_bytes),
            human_bytes(adapter.workgroup_memory_bytes as u64),
            adapter.subgroup_sizes.0,
            adapter.subgroup_sizes.1,
            match (adapter.cooperative, adapter.workgroup_matrices) {
                (_, true) => ", matrices of subgroups and of whole workgroups",
                (true, false) => ", matrices of subgroups",
                (false, false) => "",
            },
            if adapter.usable { "" } else { "   cannot be used: it lacks push constants" },
        ))?;
    }
    Ok(super::OK)
}
