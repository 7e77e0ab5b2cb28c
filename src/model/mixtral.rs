//! Mixtral 8x7B and 8x22B.
