//! Text made to break the reader: it must come back with diagnostics, in bounded time and stack.

use std::path::Path;
use std::time::{Duration, Instant};

use qapi_gen::{Dialect, Options, load_hx, load_schema};

use crate::{Memory, load, load_with, rendered};

/// More than any text takes on a busy machine: what runs away takes longer.
const HANGS_AFTER: Duration = Duration::from_secs(120);

/// Loads a text as schema of both dialects and as table, and renders what comes of it.
fn survive(text: &str) {
    let start = Instant::now();
    let shown = rendered(&load(text));
    assert!(
        shown.len() < 4 << 20,
        "{} bytes of diagnostics",
        shown.len()
    );
    let legacy = Options {
        dialect: Dialect::Legacy,
        ..Options::default()
    };
    drop(rendered(&load_with(text, &legacy)));
    let reader = Memory::default()
        .with("t.json", "{ 'command': 'a' }")
        .with("t.hx", text);
    let mut loaded = load_schema(Path::new("t.json"), &reader, &Options::default()).unwrap();
    match load_hx(Path::new("t.hx"), &reader, &mut loaded) {
        Ok(_) => drop(qapi_gen::diagnostic::render(
            &loaded.warnings,
            &loaded.sources,
        )),
        Err(failure) => drop(failure.render()),
    }
    let taken = start.elapsed();
    let head: String = text.chars().take(40).collect();
    assert!(taken < HANGS_AFTER, "{taken:?} for {head:?}");
}

#[test]
fn deep_nesting() {
    for unit in [
        "[", "{", "{'a':", "{'a':[", "{'a':\n{", "}", "]", "[[]", "##\n", "# [\n", "'", "\\",
    ] {
        survive(&unit.repeat(20_000));
    }
    let cond = "{'not':".repeat(60) + "'A'" + &"}".repeat(60);
    survive(&format!("{{ 'command': 'a', 'if': {cond} }}"));
    let quotes = "#".to_owned() + &" ".repeat(9) + "- ";
    let text: Vec<String> = (0..300)
        .map(|n| format!("# {}- x", "  ".repeat(n)))
        .collect();
    survive(&format!("##\n{}\n##\n", text.join("\n")));
    survive(&format!("##\n# {}\n##\n{quotes}", "- ".repeat(20_000)));
    survive(&format!("##\n{}##\n", "# .. note::\n".repeat(5_000)));
}

#[test]
fn long_chains() {
    let chain = |count: usize| {
        let mut text = "{ 'struct': 'S0x', 'data': {} }\n".to_owned();
        for n in 1..=count {
            text += &format!(
                "{{ 'struct': 'S{n}x', 'base': 'S{}x', 'data': {{}} }}\n",
                n - 1
            );
        }
        text
    };
    load(&chain(60)).unwrap();
    let text = rendered(&load(&chain(2000)));
    assert!(
        text.contains("object derives through more than 64 levels"),
        "{text:.300}"
    );
    // The same chain, the last link first.
    let reversed: Vec<String> = chain(2000).lines().rev().map(str::to_owned).collect();
    let text = rendered(&load(&reversed.join("\n")));
    assert!(
        text.contains("object derives through more than 64 levels"),
        "{text:.300}"
    );
}

#[test]
fn unions_that_double_at_each_level() {
    let mut text =
        "{ 'enum': 'Tag', 'data': [ 'a', 'b' ] }\n{ 'struct': 'U0x', 'data': {} }\n".to_owned();
    for n in 1..50 {
        text += &format!(
            "{{ 'union': 'U{n}x', 'base': {{ 't{n}': 'Tag' }}, 'discriminator': 't{n}', \
             'data': {{ 'a': 'U{p}x', 'b': 'U{p}x' }} }}\n",
            p = n - 1
        );
    }
    // Whoever follows all branches never comes back.
    load(&text).unwrap();
}

#[test]
fn includes_without_end() {
    let mut reader = Memory::default();
    for n in 0..200 {
        let text = format!("{{ 'include': 'f{}.json' }}", n + 1);
        reader = reader.with(&format!("f{n}.json"), &text);
    }
    let failure = load_schema(Path::new("f0.json"), &reader, &Options::default()).unwrap_err();
    assert!(
        failure.render().contains("too many includes"),
        "{}",
        failure.render()
    );
}

#[test]
fn conditions_with_many_identifiers() {
    let list: Vec<String> = (0..40).map(|n| format!("'C{n}'")).collect();
    let text = format!(
        "{{ 'struct': 'Thing', 'data': {{}}, 'if': {{ 'any': [ {} ] }} }}
         {{ 'command': 'a', 'returns': 'Thing', 'if': 'C0' }}",
        list.join(", ")
    );
    assert!(rendered(&load(&text)).contains("the conditions are too complex to compare"));
}

#[test]
fn long_names() {
    let long = "a".repeat(100_000);
    survive(&format!("{{ 'command': '{long}', '{long}': 'b' }}"));
    survive(&format!(
        "##\n# @{long}:\n#\n# @{long}: {long}\n##\n{{ 'command': 'a' }}"
    ));
    survive(&format!(
        "{{ .{long} = {long}, .name = \"{long}\", .args_type = \"{long}\" }}"
    ));
    let nested = format!("{{ '{}': ", "b".repeat(4000)).repeat(40);
    survive(&format!(
        "{{ 'type': 'A', 'data': {nested} 'int' {} }}",
        "}".repeat(40)
    ));
}

#[test]
fn thousands_of_mistakes() {
    let text = rendered(&load(&"{ 'command': 'A' }\n".repeat(5_000)));
    assert!(
        text.contains("further findings are not shown"),
        "{:.300}",
        text
    );
    survive(&"{ 'command': ; }\n".repeat(5_000));
    survive(&"SQMP\n".repeat(5_000));
    survive(&"/*\n{\n".repeat(5_000));
    survive(&format!(
        "{{ .name = \"a\", .args_type = \"{}\" }}",
        "a:s,".repeat(20_000)
    ));
}

/// Many prefixes of sound text, and sound text with a byte changed: whatever it gives, it comes
/// back.
#[test]
fn damaged_text() {
    let schema = std::fs::read_to_string("tests/schemas/doc-duplicates.json").unwrap()
        + &std::fs::read_to_string("tests/schemas/condition-leak.json").unwrap();
    let legacy = "##\n# @A\n#\n# @b: c\n##\n{ 'type': 'A', 'data': { 'b': { 'c': 'int' } } }\n\
                  { 'union': 'U', 'base': 'A', 'data': { 'x': 'A', 'y': [ 'int' ] } }\n";
    let schema = schema + legacy;
    let table = std::fs::read_to_string("tests/hx/warnings.hx").unwrap();
    for text in [&schema, &table] {
        for end in (0..text.len())
            .step_by(7)
            .filter(|end| text.is_char_boundary(*end))
        {
            survive(&text[..end]);
        }
        let mut random = 12345_u32;
        let replacements = b"{}[]:,'\"#@\n\\-*. \0x";
        for _ in 0..250 {
            random = random.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let at = (random >> 8) as usize % text.len();
            let byte = replacements[(random >> 3) as usize % replacements.len()];
            let mut bytes = text.clone().into_bytes();
            bytes[at] = byte;
            if let Ok(text) = String::from_utf8(bytes) {
                survive(&text);
            }
        }
    }
}
