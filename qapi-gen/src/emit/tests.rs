//! Goldens of generated code.
