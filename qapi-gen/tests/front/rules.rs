//! Rules that need more than a file of the goldens: many of something, several files, one thing in
//! two spellings.

use std::path::Path;

use qapi_gen::{Options, load_schema};

use crate::{Memory, load, load_with, rendered};

/// The messages of a schema, without places and notes.
fn messages(text: &str) -> Vec<String> {
    match load(text) {
        Ok(loaded) => loaded.warnings.into_iter().map(|one| one.message).collect(),
        Err(failure) => failure
            .diagnostics
            .into_iter()
            .map(|one| one.message)
            .collect(),
    }
}

#[test]
fn accepted() {
    let cases = [
        "",
        "# only a comment",
        "{ 'enum': 'Empty', 'data': [] }",
        "{ 'struct': 'Empty', 'data': {} }",
        "{ 'data': { 'a': 'int' }, 'struct': 'KeyLast' }",
        "{ 'struct': 'Later', 'data': { 'a': 'Sooner' } } { 'struct': 'Sooner', 'data': {} }",
        "{ 'command': 'a', 'data': {} } { 'command': 'b', 'features': ['if', 'int', 'name'] }",
        "{ 'struct': 'Keys', 'data': { 'data': 'str', 'if': 'str', 'features': ['str'] } }",
        "{ 'struct': '__org.qemu_x-Struct', 'data': { '__org.qemu_x-member': \
           { 'type': 'str', 'features': [ 'unstable' ] } } }",
        "{ 'event': '__ORG.QEMU_X-EVENT', 'features': [ 'unstable' ] }",
        "{ 'enum': 'Digits', 'data': [ '0', '16', '4k', '3des' ] }",
        "{ 'alternate': 'StrOrNull', 'data': { 's': 'str', 'n': 'null' } }",
        "{ 'struct': 'Tree', 'data': { '*left': 'Tree', 'all': [ 'Tree' ] } }",
        "{ 'enum': 'Tag', 'data': [ 'a', 'b' ] } { 'struct': 'One', 'data': { 'x': 'int' } } \
         { 'union': 'Inner', 'base': { 't': 'Tag' }, 'discriminator': 't', \
           'data': { 'a': 'One' } } \
         { 'union': 'Outer', 'base': { 'o': 'Tag' }, 'discriminator': 'o', \
           'data': { 'a': 'Inner', 'b': 'Inner' } }",
    ];
    for text in cases {
        assert_eq!(messages(text), Vec::<String>::new(), "for {text}");
    }
}

#[test]
fn branches_may_share_names_with_each_other() {
    let text = "{ 'enum': 'Tag', 'data': [ 'a', 'b' ] }
        { 'struct': 'One', 'data': { 'x-y': { 'type': 'int', 'features': [ 'unstable' ] } } }
        { 'struct': 'Two', 'data': { 'x-y': { 'type': 'str', 'features': [ 'unstable' ] } } }
        { 'union': 'Both', 'base': { 't': 'Tag' }, 'discriminator': 't',
          'data': { 'a': 'One', 'b': 'Two' } }";
    assert_eq!(messages(text), Vec::<String>::new());
}

#[test]
fn sixty_four_features_are_the_limit() {
    let schema = |count: usize| {
        let list: Vec<String> = (0..count).map(|n| format!("'f{n}'")).collect();
        format!("{{ 'command': 'a', 'features': [ {} ] }}", list.join(", "))
    };
    assert_eq!(messages(&schema(64)), Vec::<String>::new());
    assert_eq!(
        messages(&schema(65)),
        ["Maximum of 64 schema features is permitted"]
    );
}

#[test]
fn one_mistake_gives_one_message() {
    // A broken type is declared all the same, so its users are fine.
    let text = "{ 'struct': 'Broken', 'data': 1 }
{ 'struct': 'Shape', 'date': {} }
{ 'struct': 'User', 'base': 'Shape', 'data': { 'a': 'Shape' } }
{ 'union': 'Other', 'base': 'Shape', 'discriminator': 'kind', 'data': {} }
";
    let expected = [
        "stray '1'",
        "struct misses key 'data'",
        "struct has unknown key 'date'",
    ];
    assert_eq!(messages(text), expected);
}

#[test]
fn a_missing_top_file_is_a_diagnostic() {
    let failure = load_schema(
        Path::new("none.json"),
        &Memory::default(),
        &Options::default(),
    )
    .unwrap_err();
    let text = failure.render();
    assert!(
        text.contains("can't read schema file 'none.json': no such file"),
        "{text}"
    );
}

#[test]
fn a_file_is_read_once_however_it_is_named() {
    let reader = Memory::default()
        .with(
            "top/main.json",
            "{ 'include': 'a.json' } { 'include': '../other/b.json' }",
        )
        .with(
            "top/a.json",
            "{ 'include': '../top/./b/../c.json' } { 'enum': 'Aa', 'data': [] }",
        )
        .with("top/c.json", "{ 'enum': 'Cc', 'data': [] }")
        .with(
            "other/b.json",
            "{ 'include': '../top/c.json' } { 'enum': 'Bb', 'data': [] }",
        );
    let loaded = load_schema(Path::new("top/main.json"), &reader, &Options::default()).unwrap();
    let files: Vec<&str> = loaded
        .sources
        .files()
        .iter()
        .map(|file| file.path.as_str())
        .collect();
    assert_eq!(
        files,
        ["top/main.json", "top/a.json", "top/c.json", "other/b.json"]
    );
    let modules: Vec<&str> = loaded
        .schema
        .modules
        .iter()
        .map(|module| module.name.as_str())
        .collect();
    assert_eq!(modules, ["main", "a", "c", "other/b"]);
    let names: Vec<&str> = loaded
        .schema
        .definitions
        .iter()
        .map(|one| one.name.as_str())
        .collect();
    assert_eq!(names, ["Cc", "Aa", "Bb"]);
}

#[test]
fn a_loop_over_three_files_is_found() {
    let reader = Memory::default()
        .with("a.json", "{ 'include': 'b.json' }")
        .with("b.json", "{ 'include': 'c.json' }")
        .with("c.json", "{ 'include': './a.json' }");
    let failure = load_schema(Path::new("a.json"), &reader, &Options::default()).unwrap_err();
    let text = failure.render();
    assert!(
        text.starts_with("c.json:1:14: error: inclusion loop for ./a.json"),
        "{text}"
    );
    assert!(
        text.contains("included from b.json:1\n   = included from a.json:1"),
        "{text}"
    );
}

#[test]
fn carriage_returns_change_nothing() {
    let text = "##\n# @a:\n#\n# @b: text\n#     more\n#\n# Since: 1.0\n##\n\
                { 'command': 'a',\n  'data': { 'b': 'c' } }\n";
    let plain = rendered(&load(text));
    let windows = rendered(&load(&text.replace('\n', "\r\n")));
    assert_eq!(plain, windows);
    assert!(
        plain.contains("t.json:10:18: error: member 'b' uses unknown type 'c'"),
        "{plain}"
    );
}

#[test]
fn conditions_select_what_is_there() {
    let text = "{ 'enum': 'Tag', 'data': [ 'a', { 'name': 'b', 'if': 'WITH_B' } ] }
        { 'struct': 'One', 'data': { 'x': { 'type': 'int', 'if': { 'not': 'WITH_B' } } } }
        { 'struct': 'Two', 'data': {}, 'if': 'WITH_B' }
        { 'union': 'Both', 'base': { 't': 'Tag' }, 'discriminator': 't',
          'data': { 'a': 'One', 'b': { 'type': 'Two', 'if': 'WITH_B' } } }
        { 'command': 'get-both', 'returns': 'Both',
          'features': [ { 'name': 'f', 'if': { 'all': [ 'WITH_B', 'WITH_C' ] } } ] }";
    let shape = |defines: &[&str]| {
        let defines = defines.iter().map(|name| (*name).to_owned()).collect();
        let options = Options {
            defines,
            ..Options::default()
        };
        let loaded = load_with(text, &options).unwrap();
        crate::schema::describe(&loaded.schema)
    };
    let without =
        "enum Tag: a\nstruct One: x: int\nunion Both: t: Tag | t a=One\ncommand get-both() -> Both";
    assert_eq!(shape(&[]), without);
    assert_eq!(shape(&["WITH_C"]), without);
    let with = "enum Tag: a b\nstruct One:\nstruct Two:\nunion Both: t: Tag | t a=One b=Two\n\
                command get-both() -> Both +f";
    assert_eq!(shape(&["WITH_B", "WITH_C"]), with);
}

#[test]
fn examples_fit_the_schema() {
    let schema = |example: &str| {
        let lines: String = example
            .lines()
            .map(|line| format!("#     {line}\n"))
            .collect();
        format!(
            "{{ 'enum': 'Mode', 'data': [ 'fast', 'safe' ] }}
{{ 'struct': 'Fast', 'data': {{ 'speed': 'uint8' }} }}
{{ 'union': 'Options', 'base': {{ 'mode': 'Mode' }}, 'discriminator': 'mode',
   'data': {{ 'fast': 'Fast' }} }}
{{ 'alternate': 'NameOrNot', 'data': {{ 'name': 'str', 'not': 'null' }} }}
{{ 'command': 'set', 'data': 'Options', 'boxed': true, 'returns': [ 'Fast' ] }}
{{ 'command': 'raw', 'gen': false }}
{{ 'event': 'DONE', 'data': {{ 'name': 'NameOrNot' }} }}
##
# .. qmp-example::
#
{lines}##
"
        )
    };
    let cases = [
        (
            r#"-> { "execute": "set", "arguments": { "mode": "fast", "speed": 255 } }"#,
            "",
        ),
        (
            r#"-> { "execute": "set", "arguments": { "mode": "safe" }, "id": 1 }"#,
            "",
        ),
        (
            r#"-> { "execute": "raw", "arguments": { "what": "ever" } }"#,
            "",
        ),
        (
            r#"<- { "event": "DONE", "data": { "name": null }, "timestamp": {} }"#,
            "",
        ),
        (
            r#"<- { "error": { "class": "GenericError", "desc": "no" } }"#,
            "",
        ),
        (
            "-> { \"execute\": \"set\",\n     \"arguments\": { \"mode\": \"safe\" } }\n\
             <- { \"return\": [ { \"speed\": 1 } ] }",
            "",
        ),
        (r#"-> { "execute": "set" }"#, "'arguments.mode' is missing"),
        (r#"-> { "execute": "sat" }"#, "there is no command 'sat'"),
        (
            r#"-> { "excute": "set" }"#,
            "a request has a string 'execute'",
        ),
        (
            r#"-> { "execute": "set", "arguments": { "mode": "fast" } }"#,
            "'arguments.speed' is missing",
        ),
        (
            r#"-> { "execute": "set", "arguments": { "mode": "fast", "speed": 256 } }"#,
            "'arguments.speed' is no uint8",
        ),
        (
            r#"-> { "execute": "set", "arguments": { "mode": "safe", "speed": 1 } }"#,
            "'arguments.speed' is unexpected",
        ),
        (
            r#"-> { "execute": "set", "arguments": { "mode": "slow" } }"#,
            "'arguments.mode': 'slow' is no value of Mode",
        ),
        (
            r#"<- { "event": "DONE", "data": { "name": 1 } }"#,
            "'data.name' fits no branch of NameOrNot",
        ),
        (r#"<- { "event": "DON" }"#, "there is no event 'DON'"),
        (
            "-> { \"execute\": \"set\", \"arguments\": { \"mode\": \"safe\" } }\n\
             <- { \"return\": [ 1 ] }",
            "'return[0]' is no Fast",
        ),
        (
            "-> { \"execute\": \"raw\" }\n<- { \"return\": { \"a\": 1 } }",
            "the command returns {}",
        ),
    ];
    for (example, expected) in cases {
        let expected: Vec<String> = match expected {
            "" => Vec::new(),
            text => vec![format!("example does not fit the schema: {text}")],
        };
        assert_eq!(messages(&schema(example)), expected, "for {example}");
    }
    let found = messages(&schema("-> { \"execute\": \"set\", }"));
    assert!(
        found[0].starts_with("example is not valid JSON"),
        "{found:?}"
    );
}
