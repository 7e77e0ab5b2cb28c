//! Everything that runs on any machine, as one binary.

mod checkpoint;
mod config;
mod fixtures;
mod units;
