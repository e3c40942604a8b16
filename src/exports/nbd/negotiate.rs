//! The handshake of one connection: from the greeting to the choice of an export.
//!
//! ```text
//! greeting -> client flags -> option -> reply -> option -> ... -> NBD_OPT_GO or NBD_OPT_EXPORT_NAME
//!                                                                   NBD_OPT_ABORT, or any breach: closed
//! ```
//!
//! Nothing here is bounded in time; the caller gives the whole handshake a deadline.

use std::io;
use std::sync::Arc;

use bytes::{Buf, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};

use super::codec::constants::*;
use super::codec::handshake::{
    ClientFlags, ClientOption, InfoRequest, InvalidOption, MetaQuery, OptionHeader, option_name,
    put_export_name_reply, put_greeting, put_option_reply,
};
use super::registry::{ExportRef, Registry};
use super::request::{BASE_ALLOCATION_ID, Terms};
use crate::limits;

/// What a handshake leads to.
pub(super) struct Negotiated {
    pub(super) export: ExportRef,
    pub(super) terms: Terms,
    /// Bytes that the client has sent ahead of the transmission phase.
    pub(super) early: BytesMut,
}

/// What a server offers beyond its exports.
#[derive(Debug, Clone, Copy)]
pub(super) struct Offer {
    /// Several connections to one export see each other's flushed writes. Always true of the engine, and said unless
    /// the server takes one connection only.
    pub(super) multi_conn: bool,
}

/// Runs the handshake. `None` when the client has left in good order.
pub(super) async fn negotiate<S>(
    socket: &mut S,
    registry: &Arc<Registry>,
    offer: Offer,
) -> io::Result<Option<Negotiated>>
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    let mut negotiation = Negotiation {
        socket,
        registry,
        offer,
        input: BytesMut::new(),
        output: BytesMut::new(),
        no_zeroes: false,
        structured: false,
        base_allocation_of: None,
    };
    negotiation.run().await
}

struct Negotiation<'a, S> {
    socket: &'a mut S,
    registry: &'a Arc<Registry>,
    offer: Offer,
    input: BytesMut,
    /// Replies of the present option.
    output: BytesMut,
    no_zeroes: bool,
    structured: bool,
    /// The export for which base:allocation was selected.
    base_allocation_of: Option<String>,
}

/// What an option leads to.
enum Next {
    Option,
    Transmission(Box<ExportRef>),
    Closed,
}

impl<S: AsyncRead + AsyncWrite + Unpin> Negotiation<'_, S> {
    async fn run(&mut self) -> io::Result<Option<Negotiated>> {
        put_greeting(&mut self.output);
        self.send().await?;
        let bits = u32::from_be_bytes(self.take().await?);
        let flags = ClientFlags::decode(bits).ok_or_else(|| breach("unknown client flags"))?;
        self.no_zeroes = flags.no_zeroes;
        loop {
            let header = OptionHeader::decode(&self.take().await?)
                .ok_or_else(|| breach("an option has a wrong magic number"))?;
            if !flags.fixed_newstyle && header.option != NBD_OPT_EXPORT_NAME {
                return Err(breach("options are used without fixed newstyle"));
            }
            let next = self.option(header).await?;
            self.send().await?;
            match next {
                Next::Option => {}
                Next::Closed => return Ok(None),
                Next::Transmission(export) => return Ok(Some(self.finish(*export))),
            }
        }
    }

    fn finish(&mut self, export: ExportRef) -> Negotiated {
        let options = export.options();
        let terms = Terms {
            writable: options.writable,
            writethrough: options.writethrough,
            structured: self.structured,
            // A selection made for another export is void.
            base_allocation: self.base_allocation_of.as_ref() == Some(&options.name),
        };
        Negotiated {
            export,
            terms,
            early: std::mem::take(&mut self.input),
        }
    }

    async fn send(&mut self) -> io::Result<()> {
        self.socket.write_all(&self.output).await?;
        self.output.clear();
        self.socket.flush().await
    }

    /// The next `N` bytes.
    async fn take<const N: usize>(&mut self) -> io::Result<[u8; N]> {
        loop {
            if let Some(bytes) = self.input.first_chunk::<N>() {
                let bytes = *bytes;
                self.input.advance(N);
                return Ok(bytes);
            }
            self.fill().await?;
        }
    }

    /// An option's data, or as much of it as there is when it is longer than allowed, the rest being thrown away.
    async fn data(&mut self, length: usize) -> io::Result<Option<BytesMut>> {
        if length <= limits::NBD_MAX_OPTION {
            while self.input.len() < length {
                self.fill().await?;
            }
            return Ok(Some(self.input.split_to(length)));
        }
        if length > limits::NBD_MAX_DRAINED_OPTION {
            return Err(breach("an option is too long"));
        }
        let mut left = length;
        loop {
            let now = left.min(self.input.len());
            self.input.advance(now);
            left -= now;
            if left == 0 {
                return Ok(None);
            }
            self.fill().await?;
        }
    }

    async fn fill(&mut self) -> io::Result<()> {
        self.input.reserve(limits::NBD_HANDSHAKE_READ);
        match self.socket.read_buf(&mut self.input).await? {
            0 => Err(io::ErrorKind::UnexpectedEof.into()),
            _ => Ok(()),
        }
    }

    async fn option(&mut self, header: OptionHeader) -> io::Result<Next> {
        let option = header.option;
        let data = self.data(header.length as usize).await?;
        // To this option there is no reply that could carry an error.
        let silent = option == NBD_OPT_EXPORT_NAME;
        let Some(data) = data else {
            if silent {
                return Err(breach("the export name is too long"));
            }
            let text = format!("option {} is too long", option_name(option));
            return Ok(self.refuse(option, NBD_REP_ERR_TOO_BIG, &text));
        };
        match ClientOption::decode(option, &data) {
            Ok(ClientOption::ExportName(name)) => self.export_name(&name),
            Ok(decoded) => Ok(self.answer(option, decoded)),
            Err(InvalidOption(text)) if silent => Err(breach(text)),
            Err(InvalidOption(text)) => Ok(self.refuse(option, NBD_REP_ERR_INVALID, &text)),
        }
    }

    fn answer(&mut self, option: u32, decoded: ClientOption) -> Next {
        match decoded {
            ClientOption::Abort => {
                self.reply(option, NBD_REP_ACK, &[]);
                Next::Closed
            }
            ClientOption::List => self.list(option),
            ClientOption::StructuredReply if self.structured => self.refuse(
                option,
                NBD_REP_ERR_INVALID,
                "structured reply already negotiated",
            ),
            ClientOption::StructuredReply => {
                self.structured = true;
                self.reply(option, NBD_REP_ACK, &[])
            }
            ClientOption::StartTls => self.refuse(option, NBD_REP_ERR_POLICY, "TLS not configured"),
            ClientOption::Info(request) | ClientOption::Go(request) => self.info(option, &request),
            ClientOption::ListMetaContext(query) | ClientOption::SetMetaContext(query) => {
                self.meta_context(option, &query)
            }
            // The first has no reply, and is answered elsewhere.
            ClientOption::ExportName(_) | ClientOption::Unknown => {
                let text = format!("Unsupported option {option} ({})", option_name(option));
                self.refuse(option, NBD_REP_ERR_UNSUP, &text)
            }
        }
    }

    fn reply(&mut self, option: u32, reply: u32, parts: &[&[u8]]) -> Next {
        put_option_reply(&mut self.output, option, reply, parts);
        Next::Option
    }

    fn refuse(&mut self, option: u32, reply: u32, text: &str) -> Next {
        log::debug!("NBD: {text}");
        self.reply(option, reply, &[text.as_bytes()])
    }

    fn unknown_export(&mut self, option: u32, name: &str) -> Next {
        let mut shown: String = name.chars().take(80).collect();
        if shown.len() < name.len() {
            shown.push_str("...");
        }
        let text = format!("export '{shown}' not present");
        self.refuse(option, NBD_REP_ERR_UNKNOWN, &text)
    }

    fn list(&mut self, option: u32) -> Next {
        for export in self.registry.names() {
            let name = export.name.as_bytes();
            let description = export.description.as_deref().unwrap_or_default();
            // The registry keeps names within NBD_MAX_STRING.
            let length = (name.len() as u32).to_be_bytes();
            let parts = [&length, name, description.as_bytes()];
            self.reply(option, NBD_REP_SERVER, &parts);
        }
        self.reply(option, NBD_REP_ACK, &[])
    }

    fn transmission_flags(&self, export: &ExportRef) -> u16 {
        let mut flags =
            NBD_FLAG_HAS_FLAGS | NBD_FLAG_SEND_FLUSH | NBD_FLAG_SEND_FUA | NBD_FLAG_SEND_CACHE;
        flags |= match export.options().writable {
            true => NBD_FLAG_SEND_TRIM | NBD_FLAG_SEND_WRITE_ZEROES | NBD_FLAG_SEND_FAST_ZERO,
            false => NBD_FLAG_READ_ONLY,
        };
        if self.offer.multi_conn {
            flags |= NBD_FLAG_CAN_MULTI_CONN;
        }
        if self.structured {
            flags |= NBD_FLAG_SEND_DF;
        }
        flags
    }

    fn export_name(&mut self, name: &str) -> io::Result<Next> {
        let Some(export) = self.registry.open(name) else {
            return Err(breach(format!("export '{name}' not present")));
        };
        let flags = self.transmission_flags(&export);
        let size = export.node().size();
        put_export_name_reply(&mut self.output, size, flags, self.no_zeroes);
        Ok(Next::Transmission(Box::new(export)))
    }

    fn info(&mut self, option: u32, request: &InfoRequest) -> Next {
        let Some(export) = self.registry.open(&request.export) else {
            return self.unknown_export(option, &request.export);
        };
        if request.name {
            self.info_reply(option, NBD_INFO_NAME, request.export.as_bytes());
        }
        if let Some(description) = &export.options().description {
            self.info_reply(option, NBD_INFO_DESCRIPTION, description.as_bytes());
        }
        let node = export.node();
        let limits = node.limits();
        let keeps_to_it = request.block_size || option == NBD_OPT_INFO;
        // A client that did not ask may send anything, and is told so; what does not fit is refused then.
        let minimum = if keeps_to_it {
            limits.alignment.max(1)
        } else {
            1
        };
        // A power of two, as the specification wants it; the largest payload is one.
        let preferred = limits.preferred.clamp(4096, limits::NBD_MAX_PAYLOAD);
        let preferred = preferred.next_power_of_two();
        let sizes = [minimum, preferred.max(minimum), limits::NBD_MAX_PAYLOAD];
        self.info_reply(
            option,
            NBD_INFO_BLOCK_SIZE,
            sizes.map(u32::to_be_bytes).as_flattened(),
        );
        let mut facts = [0; 10];
        facts[..8].copy_from_slice(&node.size().to_be_bytes());
        facts[8..].copy_from_slice(&self.transmission_flags(&export).to_be_bytes());
        self.info_reply(option, NBD_INFO_EXPORT, &facts);
        if !keeps_to_it || request.block_size || limits.alignment <= 1 {
            self.reply(option, NBD_REP_ACK, &[]);
        } else {
            let text = "request NBD_INFO_BLOCK_SIZE to use this export";
            return self.refuse(option, NBD_REP_ERR_BLOCK_SIZE_REQD, text);
        }
        match option {
            NBD_OPT_GO => Next::Transmission(Box::new(export)),
            _ => Next::Option,
        }
    }

    fn info_reply(&mut self, option: u32, kind: u16, content: &[u8]) {
        self.reply(option, NBD_REP_INFO, &[&kind.to_be_bytes(), content]);
    }

    fn meta_context(&mut self, option: u32, query: &MetaQuery) -> Next {
        let sets = option == NBD_OPT_SET_META_CONTEXT;
        if sets {
            // Whatever comes of this one, the one before is void.
            self.base_allocation_of = None;
        }
        if sets && !self.structured {
            let text = format!(
                "request option '{}' when structured reply is not negotiated",
                option_name(option)
            );
            return self.refuse(option, NBD_REP_ERR_INVALID, &text);
        }
        let known = self.registry.names();
        if !known.iter().any(|export| export.name == query.export) {
            return self.unknown_export(option, &query.export);
        }
        let wanted = |query: &String| query == BASE_ALLOCATION || (!sets && query == "base:");
        if query.queries.iter().any(wanted) || (!sets && query.queries.is_empty()) {
            let id = if sets { BASE_ALLOCATION_ID } else { 0 };
            let parts = [&id.to_be_bytes(), BASE_ALLOCATION.as_bytes()];
            self.reply(option, NBD_REP_META_CONTEXT, &parts);
            if sets {
                self.base_allocation_of = Some(query.export.clone());
            }
        }
        self.reply(option, NBD_REP_ACK, &[])
    }
}

/// The client breaks the protocol in a way that has no reply: the connection is closed.
fn breach(text: impl Into<String>) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, text.into())
}
