//! The fixed newstyle handshake: greeting, client flags, options and their replies.

use bytes::{BufMut, BytesMut};

use super::Fields;
use super::constants::*;

/// Appends what the server says first: the magic numbers and its handshake flags.
pub(crate) fn put_greeting(out: &mut BytesMut) {
    out.put_u64(NBD_MAGIC);
    out.put_u64(IHAVEOPT);
    out.put_u16(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
}

/// What the client answers to the greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct ClientFlags {
    /// Options other than NBD_OPT_EXPORT_NAME may be used, and get replies.
    pub(crate) fixed_newstyle: bool,
    /// The answer to NBD_OPT_EXPORT_NAME ends without 124 zero bytes.
    pub(crate) no_zeroes: bool,
}

impl ClientFlags {
    /// Bits that the server did not offer are an error: the connection must be closed.
    pub(crate) fn decode(bits: u32) -> Option<Self> {
        let known = u32::from(NBD_FLAG_FIXED_NEWSTYLE | NBD_FLAG_NO_ZEROES);
        (bits & !known == 0).then_some(ClientFlags {
            fixed_newstyle: bits & u32::from(NBD_FLAG_FIXED_NEWSTYLE) != 0,
            no_zeroes: bits & u32::from(NBD_FLAG_NO_ZEROES) != 0,
        })
    }
}

/// The fixed part of an option: its number and how many bytes follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct OptionHeader {
    pub(crate) option: u32,
    pub(crate) length: u32,
}

impl OptionHeader {
    /// `None` when the magic is wrong: the streams are out of step and the connection must be closed.
    pub(crate) fn decode(bytes: &[u8; OPTION_HEADER_SIZE]) -> Option<Self> {
        let mut fields = Fields(bytes);
        if fields.u64()? != IHAVEOPT {
            return None;
        }
        Some(OptionHeader {
            option: fields.u32()?,
            length: fields.u32()?,
        })
    }
}

/// An option with its data.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum ClientOption {
    ExportName(String),
    Abort,
    List,
    StartTls,
    Info(InfoRequest),
    Go(InfoRequest),
    StructuredReply,
    ListMetaContext(MetaQuery),
    SetMetaContext(MetaQuery),
    Unknown,
}

/// The data of NBD_OPT_INFO and NBD_OPT_GO.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InfoRequest {
    pub(crate) export: String,
    /// NBD_INFO_NAME was asked for.
    pub(crate) name: bool,
    /// NBD_INFO_BLOCK_SIZE was asked for: the client will keep to the block sizes it is told.
    pub(crate) block_size: bool,
}

/// The data of NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct MetaQuery {
    pub(crate) export: String,
    pub(crate) queries: Vec<String>,
}

/// Why an option's data is refused; the text goes to the client with NBD_REP_ERR_INVALID.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct InvalidOption(pub(in super::super) String);

impl ClientOption {
    /// Decodes the data of option number `option`.
    pub(crate) fn decode(option: u32, data: &[u8]) -> Result<Self, InvalidOption> {
        let mut fields = OptionFields {
            option,
            fields: Fields(data),
        };
        let decoded = match option {
            NBD_OPT_EXPORT_NAME => ClientOption::ExportName(fields.rest_as_name()?),
            // Clients may send a reason that nobody has defined.
            NBD_OPT_ABORT => return Ok(ClientOption::Abort),
            NBD_OPT_LIST => ClientOption::List,
            NBD_OPT_STARTTLS => ClientOption::StartTls,
            NBD_OPT_INFO => ClientOption::Info(fields.info_request()?),
            NBD_OPT_GO => ClientOption::Go(fields.info_request()?),
            NBD_OPT_STRUCTURED_REPLY => ClientOption::StructuredReply,
            NBD_OPT_LIST_META_CONTEXT => ClientOption::ListMetaContext(fields.meta_query()?),
            NBD_OPT_SET_META_CONTEXT => ClientOption::SetMetaContext(fields.meta_query()?),
            _ => return Ok(ClientOption::Unknown),
        };
        fields.end()?;
        Ok(decoded)
    }
}

/// The specification's short name of an option, for error texts.
pub(crate) fn option_name(option: u32) -> &'static str {
    match option {
        NBD_OPT_EXPORT_NAME => "export name",
        NBD_OPT_ABORT => "abort",
        NBD_OPT_LIST => "list",
        NBD_OPT_STARTTLS => "starttls",
        NBD_OPT_INFO => "info",
        NBD_OPT_GO => "go",
        NBD_OPT_STRUCTURED_REPLY => "structured reply",
        NBD_OPT_LIST_META_CONTEXT => "list meta context",
        NBD_OPT_SET_META_CONTEXT => "set meta context",
        _ => "<unknown>",
    }
}

struct OptionFields<'a> {
    option: u32,
    fields: Fields<'a>,
}

impl OptionFields<'_> {
    fn short(&self) -> InvalidOption {
        InvalidOption(format!(
            "Inconsistent lengths in option {}",
            option_name(self.option)
        ))
    }

    fn end(&self) -> Result<(), InvalidOption> {
        if self.fields.0.is_empty() {
            return Ok(());
        }
        Err(InvalidOption(format!(
            "option '{}' has unexpected length",
            option_name(self.option)
        )))
    }

    fn text(&self, bytes: &[u8]) -> Result<String, InvalidOption> {
        if bytes.len() > NBD_MAX_STRING {
            return Err(InvalidOption(format!(
                "Invalid name length: {}",
                bytes.len()
            )));
        }
        if bytes.contains(&0) {
            return Err(InvalidOption(format!(
                "Unexpected embedded NUL in option {}",
                option_name(self.option)
            )));
        }
        String::from_utf8(bytes.to_vec()).map_err(|_| {
            InvalidOption(format!(
                "String in option {} is not UTF-8",
                option_name(self.option)
            ))
        })
    }

    fn rest_as_name(&mut self) -> Result<String, InvalidOption> {
        let rest = std::mem::take(&mut self.fields.0);
        self.text(rest)
    }

    fn string(&mut self) -> Result<String, InvalidOption> {
        let length = self.fields.u32().ok_or_else(|| self.short())?;
        let bytes = usize::try_from(length)
            .ok()
            .and_then(|length| self.fields.bytes(length))
            .ok_or_else(|| self.short())?;
        self.text(bytes)
    }

    fn info_request(&mut self) -> Result<InfoRequest, InvalidOption> {
        let mut request = InfoRequest {
            export: self.string()?,
            name: false,
            block_size: false,
        };
        let count = self.fields.u16().ok_or_else(|| self.short())?;
        for _ in 0..count {
            match self.fields.u16().ok_or_else(|| self.short())? {
                NBD_INFO_NAME => request.name = true,
                NBD_INFO_BLOCK_SIZE => request.block_size = true,
                // The others are sent unasked or unknown, and unknown ones are to be ignored.
                _ => {}
            }
        }
        Ok(request)
    }

    fn meta_query(&mut self) -> Result<MetaQuery, InvalidOption> {
        let export = self.string()?;
        let count = self.fields.u32().ok_or_else(|| self.short())?;
        // The count is the peer's word; what is kept grows only with bytes that are really there.
        let mut queries = Vec::new();
        for _ in 0..count {
            queries.push(self.string()?);
        }
        Ok(MetaQuery { export, queries })
    }
}

/// Appends a reply to `option`.
pub(crate) fn put_option_reply(out: &mut BytesMut, option: u32, reply: u32, parts: &[&[u8]]) {
    let length: usize = parts.iter().map(|part| part.len()).sum();
    out.put_u64(NBD_REP_MAGIC);
    out.put_u32(option);
    out.put_u32(reply);
    // Parts are fixed fields and strings of at most NBD_MAX_STRING bytes.
    out.put_u32(length as u32);
    for part in parts {
        out.put_slice(part);
    }
}

/// Appends the answer to NBD_OPT_EXPORT_NAME, which has no reply header.
pub(crate) fn put_export_name_reply(
    out: &mut BytesMut,
    size: u64,
    transmission_flags: u16,
    no_zeroes: bool,
) {
    out.put_u64(size);
    out.put_u16(transmission_flags);
    if !no_zeroes {
        out.put_bytes(0, 124);
    }
}
