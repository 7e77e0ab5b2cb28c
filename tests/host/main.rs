//! Everything that needs no GPU: bytes, plans, schedules, shaders as text, CPU attention.

mod shaders;
