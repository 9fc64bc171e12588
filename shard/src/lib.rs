//! Batches in, tokens out: one process per device.
