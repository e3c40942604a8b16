//! Names: the alphabet, the case of each kind, reserved words.

use crate::ast::{Definition, Feature, Kind, Member, Name, Pragma};
use crate::check::own_members;
use crate::diagnostic::{Diagnostic, Sink};

/// Checks every name of a definition.
pub(super) fn check(definition: &Definition, pragma: &Pragma, sink: &mut Sink) {
    let name = &definition.name;
    let word = definition.kind.word();
    let may_deviate = pragma.member_name_exceptions.contains(&name.text);
    let case = if may_deviate { Case::Any } else { Case::Lower };
    match &definition.kind {
        Kind::Command(_) => {
            let excepted = pragma.command_name_exceptions.contains(&name.text);
            check_name(
                name,
                word,
                if excepted { Case::Any } else { Case::Lower },
                sink,
            );
        }
        Kind::Event(_) => check_name(name, word, Case::Upper, sink),
        _ => {
            check_name(name, word, Case::Camel, sink);
            if name.text.ends_with("List") {
                let message = format!("{word} name '{}' should not end in 'List'", name.text);
                let error = Diagnostic::error(name.span, message);
                sink.push(error.note("such names are taken by the lists of other types"));
            }
        }
    }
    check_features(&definition.features, sink);
    for member in own_members(&definition.kind) {
        check_member(member, case, sink);
    }
    // The branches of a union are values of an enum, where they are checked.
    match &definition.kind {
        Kind::Enum(values) => {
            for value in values {
                check_enum_value(&value.name, case, sink);
                check_features(&value.features, sink);
            }
        }
        Kind::Alternate(branches) => {
            for branch in branches {
                check_name(&branch.name, "branch", Case::Lower, sink);
            }
        }
        _ => {}
    }
}

fn check_member(member: &Member, case: Case, sink: &mut Sink) {
    let name = &member.name;
    check_name(name, "member", case, sink);
    let c_name = c_name(&name.text);
    if c_name == "u" || c_name.starts_with("has_") {
        let message = format!("member '{}' uses reserved name", name.text);
        let error = Diagnostic::error(name.span, message);
        sink.push(error.note("'u' and names that start with 'has-' are taken by QEMU's C code"));
    }
    check_features(&member.features, sink);
}

fn check_features(features: &[Feature], sink: &mut Sink) {
    for feature in features {
        check_name(&feature.name, "feature", Case::Lower, sink);
    }
}

/// Values may start with a digit.
fn check_enum_value(name: &Name, case: Case, sink: &mut Sink) {
    let digit = name.text.starts_with(|c: char| c.is_ascii_digit());
    let tried = if digit {
        format!("d{}", name.text)
    } else {
        name.text.clone()
    };
    check_text(&tried, name, "value", case, sink);
}

/// Which letters a name may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Case {
    Lower,
    Upper,
    Camel,
    /// Excepted by a pragma.
    Any,
}

fn check_name(name: &Name, role: &str, case: Case, sink: &mut Sink) {
    check_text(&name.text, name, role, case, sink);
}

fn check_text(text: &str, name: &Name, role: &str, case: Case, sink: &mut Sink) {
    let shown = &name.text;
    let Some(stem) = stem(text).filter(|_| !c_name(text).starts_with("q_")) else {
        let error = Diagnostic::error(name.span, format!("{role} '{shown}' has an invalid name"));
        sink.push(error.note(
            "names are letters, digits, '-' and '_', start with a letter and not with 'q-' or 'q_'",
        ));
        return;
    };
    let upper = stem.contains(|c: char| c.is_ascii_uppercase());
    let lower = stem.contains(|c: char| c.is_ascii_lowercase());
    let complaint = match case {
        Case::Lower if upper || stem.contains('_') => "must not use uppercase or '_'",
        Case::Upper if lower || stem.contains('-') => "must not use lowercase or '-'",
        Case::Camel if !is_camel(stem) => "must use CamelCase",
        _ => return,
    };
    sink.error(name.span, format!("name of {role} '{shown}' {complaint}"));
}

/// The part of a name behind the prefixes `__RFQDN_` and `x-`, on which the rules of case apply.
/// `None` if the name is invalid.
pub(super) fn stem(name: &str) -> Option<&str> {
    let plain = match name.strip_prefix("__") {
        Some(rest) => {
            // The vendor's domain: up to the first '_', as domains have none.
            let (vendor, rest) = rest.split_once('_')?;
            let legal = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '-';
            if vendor.is_empty() || !vendor.chars().all(legal) {
                return None;
            }
            rest
        }
        None => name,
    };
    let stem = match plain.get(..2) {
        Some("x-" | "X-") => &plain[2..],
        _ => plain,
    };
    let mut chars = stem.chars();
    let sound = chars.next().is_some_and(|c| c.is_ascii_alphabetic())
        && chars.all(|c| c.is_ascii_alphanumeric() || c == '-' || c == '_');
    sound.then_some(stem)
}

/// An upper case letter, then letters and digits with a lower case letter among them.
fn is_camel(stem: &str) -> bool {
    let tail = stem.get(1..).unwrap_or("");
    stem.starts_with(|c: char| c.is_ascii_uppercase())
        && stem.chars().all(|c| c.is_ascii_alphanumeric())
        && tail.contains(|c: char| c.is_ascii_lowercase())
}

/// The name as an identifier of C: two names that give the same one clash.
pub(super) fn c_name(name: &str) -> String {
    name.replace(['-', '.'], "_")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stems_follow_the_grammar_of_names() {
        let cases = [
            ("block-core", Some("block-core")),
            ("x-perf", Some("perf")),
            ("__org.qemu_x-Enum", Some("Enum")),
            ("__com.redhat_drive_add", Some("drive_add")),
            ("X-EVENT", Some("EVENT")),
            ("", None),
            ("1st", None),
            ("x-", None),
            ("a.b", None),
            ("__org_", None),
            ("__o!g_a", None),
            ("_a", None),
            ("é", None),
        ];
        for (name, expected) in cases {
            assert_eq!(stem(name), expected, "for {name:?}");
        }
    }

    #[test]
    fn camel_case_needs_a_small_letter_behind_the_first() {
        for (name, expected) in [
            ("Abc", true),
            ("AB", false),
            ("A", false),
            ("aB", false),
            ("A-b", false),
            ("QType", true),
        ] {
            assert_eq!(is_camel(name), expected, "for {name:?}");
        }
    }
}
