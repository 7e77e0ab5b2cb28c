//! One file per op, same stem as its kernel: plain loops, f64 sums. The oracle for `kernels/` and `cpu/`, and the clearest code here.

pub mod attention;
pub mod rms_norm;
