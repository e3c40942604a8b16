//! The numbers of the NBD protocol under the names of the specification ("NBD protocol", section "Values").

#![allow(
    missing_docs,
    reason = "the names are those of the specification, which documents them"
)]

// Handshake magic.
pub(crate) const NBD_MAGIC: u64 = 0x4e42_444d_4147_4943;
pub(crate) const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
pub(crate) const NBD_REP_MAGIC: u64 = 0x0003_e889_0455_65a9;

// Handshake flags of the server, and the client's flags, which have the same values.
pub(crate) const NBD_FLAG_FIXED_NEWSTYLE: u16 = 1 << 0;
pub(crate) const NBD_FLAG_NO_ZEROES: u16 = 1 << 1;

// Transmission flags.
pub(crate) const NBD_FLAG_HAS_FLAGS: u16 = 1 << 0;
pub(crate) const NBD_FLAG_READ_ONLY: u16 = 1 << 1;
pub(crate) const NBD_FLAG_SEND_FLUSH: u16 = 1 << 2;
pub(crate) const NBD_FLAG_SEND_FUA: u16 = 1 << 3;
pub(crate) const NBD_FLAG_SEND_TRIM: u16 = 1 << 5;
pub(crate) const NBD_FLAG_SEND_WRITE_ZEROES: u16 = 1 << 6;
pub(crate) const NBD_FLAG_SEND_DF: u16 = 1 << 7;
pub(crate) const NBD_FLAG_CAN_MULTI_CONN: u16 = 1 << 8;
pub(crate) const NBD_FLAG_SEND_CACHE: u16 = 1 << 10;
pub(crate) const NBD_FLAG_SEND_FAST_ZERO: u16 = 1 << 11;

// Options.
pub(crate) const NBD_OPT_EXPORT_NAME: u32 = 1;
pub(crate) const NBD_OPT_ABORT: u32 = 2;
pub(crate) const NBD_OPT_LIST: u32 = 3;
pub(crate) const NBD_OPT_STARTTLS: u32 = 5;
pub(crate) const NBD_OPT_INFO: u32 = 6;
pub(crate) const NBD_OPT_GO: u32 = 7;
pub(crate) const NBD_OPT_STRUCTURED_REPLY: u32 = 8;
pub(crate) const NBD_OPT_LIST_META_CONTEXT: u32 = 9;
pub(crate) const NBD_OPT_SET_META_CONTEXT: u32 = 10;

// Option replies.
pub(crate) const NBD_REP_ACK: u32 = 1;
pub(crate) const NBD_REP_SERVER: u32 = 2;
pub(crate) const NBD_REP_INFO: u32 = 3;
pub(crate) const NBD_REP_META_CONTEXT: u32 = 4;
const NBD_REP_FLAG_ERROR: u32 = 1 << 31;
pub(crate) const NBD_REP_ERR_UNSUP: u32 = NBD_REP_FLAG_ERROR | 1;
pub(crate) const NBD_REP_ERR_POLICY: u32 = NBD_REP_FLAG_ERROR | 2;
pub(crate) const NBD_REP_ERR_INVALID: u32 = NBD_REP_FLAG_ERROR | 3;
pub(crate) const NBD_REP_ERR_UNKNOWN: u32 = NBD_REP_FLAG_ERROR | 6;
pub(crate) const NBD_REP_ERR_BLOCK_SIZE_REQD: u32 = NBD_REP_FLAG_ERROR | 8;
pub(crate) const NBD_REP_ERR_TOO_BIG: u32 = NBD_REP_FLAG_ERROR | 9;

// Information types of NBD_OPT_INFO and NBD_OPT_GO.
pub(crate) const NBD_INFO_EXPORT: u16 = 0;
pub(crate) const NBD_INFO_NAME: u16 = 1;
pub(crate) const NBD_INFO_DESCRIPTION: u16 = 2;
pub(crate) const NBD_INFO_BLOCK_SIZE: u16 = 3;

// Transmission magic.
pub(crate) const NBD_REQUEST_MAGIC: u32 = 0x2560_9513;
pub(crate) const NBD_SIMPLE_REPLY_MAGIC: u32 = 0x6744_6698;
pub(crate) const NBD_STRUCTURED_REPLY_MAGIC: u32 = 0x668e_33ef;

// Commands.
pub(crate) const NBD_CMD_READ: u16 = 0;
pub(crate) const NBD_CMD_WRITE: u16 = 1;
pub(crate) const NBD_CMD_DISC: u16 = 2;
pub(crate) const NBD_CMD_FLUSH: u16 = 3;
pub(crate) const NBD_CMD_TRIM: u16 = 4;
pub(crate) const NBD_CMD_CACHE: u16 = 5;
pub(crate) const NBD_CMD_WRITE_ZEROES: u16 = 6;
pub(crate) const NBD_CMD_BLOCK_STATUS: u16 = 7;

// Command flags.
pub(crate) const NBD_CMD_FLAG_FUA: u16 = 1 << 0;
pub(crate) const NBD_CMD_FLAG_NO_HOLE: u16 = 1 << 1;
pub(crate) const NBD_CMD_FLAG_DF: u16 = 1 << 2;
pub(crate) const NBD_CMD_FLAG_REQ_ONE: u16 = 1 << 3;
pub(crate) const NBD_CMD_FLAG_FAST_ZERO: u16 = 1 << 4;

// Structured replies.
pub(crate) const NBD_REPLY_FLAG_DONE: u16 = 1 << 0;
pub(crate) const NBD_REPLY_TYPE_NONE: u16 = 0;
pub(crate) const NBD_REPLY_TYPE_OFFSET_DATA: u16 = 1;
pub(crate) const NBD_REPLY_TYPE_OFFSET_HOLE: u16 = 2;
pub(crate) const NBD_REPLY_TYPE_BLOCK_STATUS: u16 = 5;
pub(crate) const NBD_REPLY_TYPE_ERROR: u16 = (1 << 15) | 1;
pub(crate) const NBD_REPLY_TYPE_ERROR_OFFSET: u16 = (1 << 15) | 2;

// The base:allocation context.
pub(crate) const BASE_ALLOCATION: &str = "base:allocation";
pub(crate) const NBD_STATE_HOLE: u32 = 1 << 0;
pub(crate) const NBD_STATE_ZERO: u32 = 1 << 1;

// Sizes of fixed messages in bytes.
pub(crate) const REQUEST_SIZE: usize = 28;
pub(crate) const OPTION_HEADER_SIZE: usize = 16;
/// The specification's limit of a string: an export name, a description, a query, an error text.
pub(crate) const NBD_MAX_STRING: usize = 4096;
