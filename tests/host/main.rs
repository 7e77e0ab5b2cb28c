//! Everything that needs no GPU: bytes, plans, schedules, shaders as text, CPU attention.

mod checkpoint;
mod config;
mod fixtures;
mod shaders;
mod units;
