//! What a client may make the reader hold in memory.

/// The greatest token, and the greatest sum of all tokens of one message, in bytes. As QEMU: a
/// client that works there works here, and it is far above any real command.
pub const TOKEN_BYTES: usize = 64 << 20;

/// The greatest number of tokens in one message. Bounds the values a message of tiny tokens can
/// expand to (as QEMU).
pub const TOKENS: usize = 2 << 20;

/// The greatest depth of braces and brackets together. Bounds the stack that dropping or printing
/// a value takes (as QEMU).
pub const NESTING: usize = 1 << 10;

/// What a token costs beside its text, in bytes: a value, or its share of an object.
pub const TOKEN_COST: usize = 100;

/// The longest part of a broken message that an error repeats, in bytes. QEMU bounds only the
/// parser's messages so; here the lexer's are bounded too, or one stray byte after a long string
/// would send all of it back.
pub const ERROR_BYTES: usize = 1023;

/// The limits of one reader. The default is that of the wire; tests take smaller ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Bytes of one token and of all tokens of a message: [`TOKEN_BYTES`].
    pub token_bytes: usize,
    /// Tokens of a message: [`TOKENS`].
    pub tokens: usize,
    /// Depth of a message: [`NESTING`].
    pub nesting: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            token_bytes: TOKEN_BYTES,
            tokens: TOKENS,
            nesting: NESTING,
        }
    }
}
