//! Limits on what a schema or .hx file may ask of the generator.
//!
//! Schemas come from users and from a fuzzer; none may overflow the stack or take unbounded memory
//! or time.

/// Nesting of `{` and `[`, of conditions and of documentation blocks. Real schemas stay below 8;
/// the parser and the passes recurse once per level.
pub const MAX_NESTING: usize = 64;

/// Bytes of one source file. The largest real one has 250 KB.
pub const MAX_FILE_BYTES: u64 = 16 << 20;

/// Bytes of one string in a schema. Names are repeated in messages and in what is derived from
/// them.
pub const MAX_STRING_BYTES: usize = 4096;

/// Files included from each other, one inside the other: the loader recurses once per level.
pub const MAX_INCLUDE_DEPTH: usize = 64;

/// Files of one schema. QEMU's has 42.
pub const MAX_FILES: usize = 4096;

/// Definitions that derive from each other (`base`, or unions as branches of unions): the passes
/// recurse once per level. QEMU's longest chain has 4.
pub const MAX_DERIVATION: usize = 64;

/// Distinct identifiers in two conditions that are compared: all their assignments are tried.
pub const MAX_CONDITION_IDENTIFIERS: usize = 12;

/// Distinct feature names in a schema; QEMU keeps them in a 64-bit set.
pub const MAX_FEATURES: usize = 64;

/// Diagnostics kept; what follows is counted only. More helps nobody and a hostile file could ask
/// for millions.
pub const MAX_DIAGNOSTICS: usize = 200;
