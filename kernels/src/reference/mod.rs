//! The definition of every operation, in plain loops and f64.
