//! From a model, a machine's limits and a user's wishes to a [`Policy`](crate::policy::Policy). Pure: it runs on any machine.
//!
//! [`fit()`] takes what was wished, fills the rest with defaults, and gives expert weights all device memory that is left: a ring
//! of two layers first, then residents. It answers with every buffer's bytes by name, or refuses with numbers. What it fits it
//! does not weigh: that is the search's.
//!
//! [`search`] finds the best policy for a [`workload`] on a machine with a [`Profile`](crate::profile::Profile): it bounds, then
//! simulates ([`cost`]) the schedule that would run. [`unbuilt`] models what fulmen does not do, [`report`] says what came of it, [`compare`] how well a run was predicted.
//!
//! [`hrm`] has the roofline's equations: what bounds a policy, and what bounds the best of them. [`paper`] is the optimizer of the
//! MoE-Lightning paper, for machines and models known by name ([`presets`]); [`published`] puts its predictions beside what the
//! paper measured, and [`plot`] draws the roofline.

pub mod ablation;
pub mod compare;
pub mod cost;
mod fit;
pub mod hrm;
pub mod linear;
pub mod paper;
pub mod plot;
pub mod presets;
pub mod published;
pub mod report;
pub mod search;
pub mod unbuilt;
pub mod workload;

pub use fit::{DEFAULT_PAGE_BYTES, MachineLimits, MemoryUse, ModelBytes, Plan, PlanError, Wishes, extents, fit};
