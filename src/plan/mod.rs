//! From a model, a machine's limits and a user's wishes to a [`Policy`](crate::policy::Policy). Pure: it runs on any machine.
//!
//! [`fit()`] takes what was wished, fills the rest with defaults, and gives expert weights all device memory that is left: a ring
//! of two layers first, then residents. It answers with every buffer's bytes by name, or refuses with numbers.
//!
//! Given up for now: it fits, it does not optimise. Predicting time and searching for the best policy come on top of it.
//!
//! [`hrm`] has the roofline's equations: what bounds a policy, and what bounds the best of them. [`paper`] is the optimizer of the
//! MoE-Lightning paper, for machines and models known by name ([`presets`]); [`published`] puts its predictions beside what the
//! paper measured, and [`plot`] draws the roofline.

pub mod ablation;
pub mod cost;
mod fit;
pub mod hrm;
pub mod linear;
pub mod paper;
pub mod plot;
pub mod presets;
pub mod published;
pub mod search;
pub mod workload;

pub use fit::{DEFAULT_PAGE_BYTES, MachineLimits, MemoryUse, ModelBytes, Plan, PlanError, Wishes, extents, fit};
