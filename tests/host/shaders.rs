//! Every kernel's source against naga: it validates for every dtype and tunable, and its bindings and parameters are what
//! the Rust side believes. (to come)
