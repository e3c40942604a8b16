//! Sessions, versions, introspection, and the end of the daemon.

use qapi::handlers::{Control, Introspect};
use qapi::rt::QmpError;
use qapi::types::{CommandInfo, SchemaInfo, VersionInfo, VersionTriple};

use super::Handlers;
use crate::daemon::{Cx, StopCause};

/// The version of the protocol and of the program.
///
/// The triple is that of the QEMU whose protocol is spoken: clients compare it to learn what they may send.
pub fn version() -> VersionInfo {
    VersionInfo {
        qemu: VersionTriple {
            major: 10,
            minor: 0,
            micro: 2,
        },
        package: concat!("qblockd-", env!("CARGO_PKG_VERSION")).to_owned(),
    }
}

impl Control<Cx> for Handlers {
    async fn qmp_capabilities(
        cx: &Cx,
        args: qapi::commands::QmpCapabilities,
    ) -> Result<(), QmpError> {
        let qapi::commands::QmpCapabilities { enable } = args;
        cx.negotiate(&enable.unwrap_or_default())
    }

    async fn query_version(_cx: &Cx) -> Result<VersionInfo, QmpError> {
        Ok(version())
    }

    async fn query_commands(_cx: &Cx) -> Result<Vec<CommandInfo>, QmpError> {
        let info = |name: &&str| CommandInfo {
            name: (*name).to_owned(),
        };
        Ok(qapi::COMMAND_NAMES.iter().map(info).collect())
    }

    async fn quit(cx: &Cx) -> Result<(), QmpError> {
        cx.commit(|control| {
            control.stop(StopCause::Quit);
            Ok(())
        })
        .await
    }
}

impl Introspect<Cx> for Handlers {
    async fn query_qmp_schema(_cx: &Cx) -> Result<Vec<SchemaInfo>, QmpError> {
        Ok(qapi::schema())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_schema_describes_every_command() {
        let schema = qapi::schema();
        for command in qapi::COMMAND_NAMES {
            assert!(schema.iter().any(|info| info.name == command), "{command}");
        }
    }

    #[test]
    fn the_version_is_one_that_clients_compare() {
        let value = version().into_value();
        assert_eq!(value["qemu"]["major"], 10);
        assert!(value["package"].as_str().unwrap().starts_with("qblockd-"));
    }
}
