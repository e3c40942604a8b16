//! Wire names into Rust names.

use proc_macro2::{Ident, Span};

/// Names of types that the generated code uses itself; a schema type of that name gets a `_`.
const RESERVED_TYPES: &[&str] = &[
    "Box", "Decoded", "Err", "Members", "None", "Object", "Ok", "Option", "Path", "QType",
    "QmpError", "Result", "Self", "Some", "String", "Value", "Vec",
];

/// Keywords that cannot even be written raw.
const UNUSABLE: &[&str] = &["self", "super", "crate", "Self", "_"];

/// The name of a type: as it is, without what Rust does not allow.
pub(super) fn type_name(wire: &str) -> Ident {
    let mut name = if wire.contains(['-', '_', '.']) {
        camel(wire)
    } else {
        wire.to_owned()
    };
    if RESERVED_TYPES.contains(&name.as_str()) {
        name.push('_');
    }
    ident(&digit_safe(name, 'T'))
}

/// The name of a variant, or of a command's or event's struct: `blockdev-add` is `BlockdevAdd`.
pub(super) fn variant_name(wire: &str) -> Ident {
    ident(&digit_safe(camel(wire), 'V'))
}

/// The name of a field, function or module: `node-name` is `node_name`.
pub(super) fn snake_name(wire: &str) -> Ident {
    let name: String = wire
        .chars()
        .map(|c| {
            if c.is_ascii_alphanumeric() {
                c.to_ascii_lowercase()
            } else {
                '_'
            }
        })
        .collect();
    let name = name.trim_matches('_');
    ident(&if name.starts_with(|c: char| c.is_ascii_digit()) {
        format!("_{name}")
    } else {
        name.to_owned()
    })
}

/// Words joined with capitals. Words that are all capitals are toned down (`DIMM` is `Dimm`);
/// digits that would run together stay apart (`2_5` is `2_5`).
fn camel(wire: &str) -> String {
    let mut name = String::new();
    for word in wire
        .split(|c: char| !c.is_ascii_alphanumeric())
        .filter(|word| !word.is_empty())
    {
        let shouted = !word.contains(|c: char| c.is_ascii_lowercase());
        let mut chars = word.chars();
        let Some(first) = chars.next() else { continue };
        if first.is_ascii_digit() && name.ends_with(|c: char| c.is_ascii_digit()) {
            name.push('_');
        }
        name.push(first.to_ascii_uppercase());
        name.extend(chars.map(|c| if shouted { c.to_ascii_lowercase() } else { c }));
    }
    name
}

fn digit_safe(name: String, prefix: char) -> String {
    if name.is_empty() || name.starts_with(|c: char| c.is_ascii_digit()) {
        format!("{prefix}{name}")
    } else {
        name
    }
}

/// An identifier; keywords are written raw.
fn ident(name: &str) -> Ident {
    if UNUSABLE.contains(&name) {
        return Ident::new(&format!("{name}_"), Span::call_site());
    }
    // A keyword since edition 2024, which the parser does not know.
    if name == "gen" {
        return Ident::new_raw(name, Span::call_site());
    }
    match syn::parse_str::<Ident>(name) {
        Ok(ident) => ident,
        Err(_) => Ident::new_raw(name, Span::call_site()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn variants_are_camel_case_and_never_begin_with_a_digit() {
        for (wire, rust) in [
            (
                "blockdev-snapshot-internal-sync",
                "BlockdevSnapshotInternalSync",
            ),
            ("BLOCK_EXPORT_DELETED", "BlockExportDeleted"),
            ("qmp_capabilities", "QmpCapabilities"),
            ("KVMMissingCap", "KVMMissingCap"),
            ("DIMM", "Dimm"),
            ("2_5", "V2_5"),
            ("25", "V25"),
            ("3des", "V3des"),
            ("x86_64", "X86_64"),
            ("io_uring", "IoUring"),
            ("self", "Self_"),
            ("l1_grow.alloc_table", "L1GrowAllocTable"),
            ("__org.qemu_x-value", "OrgQemuXValue"),
        ] {
            assert_eq!(variant_name(wire).to_string(), rust);
        }
    }

    #[test]
    fn types_keep_their_names_unless_rust_needs_them() {
        for (wire, rust) in [
            ("BlockdevOptions", "BlockdevOptions"),
            ("JSONType", "JSONType"),
            ("String", "String_"),
            ("Object", "Object_"),
            ("__org.qemu_x-Enum", "OrgQemuXEnum"),
        ] {
            assert_eq!(type_name(wire).to_string(), rust);
        }
    }

    #[test]
    fn fields_are_snake_case_and_keywords_raw() {
        for (wire, rust) in [
            ("node-name", "node_name"),
            ("type", "r#type"),
            ("in", "r#in"),
            ("gen", "r#gen"),
            ("async", "r#async"),
            ("try", "r#try"),
            ("abstract", "r#abstract"),
            ("self", "self_"),
            ("Self", "self_"),
            ("CPU", "cpu"),
            ("l2-cache-size", "l2_cache_size"),
            ("16", "_16"),
            ("__org.qemu_x-member", "org_qemu_x_member"),
        ] {
            assert_eq!(snake_name(wire).to_string(), rust);
        }
    }
}
