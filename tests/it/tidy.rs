//! Style as code: the layer table, sizes, where `unsafe` may stand, and that documents name what exists.

use std::fs;
use std::path::{Path, PathBuf};

/// What the files of a folder may name: `crate::` modules and other crates of the workspace.
struct Layer {
    /// The folder or file, from the root.
    place: &'static str,
    /// First segments after `crate::` that may be used.
    modules: &'static [&'static str],
    /// Path prefixes that must not appear at all.
    never: &'static [&'static str],
}

/// The table of docs/ARCHITECTURE.md. Arrows point down.
const LAYERS: &[Layer] = &[
    Layer {
        place: "src/monitor",
        modules: &["monitor", "limits", "listen"],
        never: &["block::", "qapi::commands", "qapi::types", "qapi::events"],
    },
    Layer {
        place: "src/exports",
        modules: &["exports", "limits", "listen"],
        never: &["qapi::", "block::graph", "block::formats"],
    },
    Layer {
        place: "src/jobs",
        modules: &["jobs", "limits"],
        never: &["qapi::", "tokio::net", "std::net", "std::thread"],
    },
    Layer {
        place: "src/commands",
        modules: &[
            "commands",
            "transaction",
            "exports",
            "jobs",
            "daemon",
            "limits",
            "listen",
        ],
        never: &["tokio::net", "std::net", "std::thread"],
    },
    Layer {
        place: "src/transaction",
        modules: &[
            "transaction",
            "journal",
            "exports",
            "jobs",
            "daemon",
            "limits",
        ],
        never: &["tokio::net", "std::net", "std::thread"],
    },
    Layer {
        place: "src/journal",
        modules: &["journal", "limits"],
        never: &["qapi::", "block::graph"],
    },
    Layer {
        place: "src/block/graph",
        modules: &[
            "graph", "driver", "events", "io", "error", "units", "limits", "open",
        ],
        never: &["qapi::"],
    },
    Layer {
        place: "src/block/copy",
        modules: &["copy", "driver", "io", "error", "units", "limits"],
        never: &["qapi::", "block::graph"],
    },
    Layer {
        place: "src/block/filters",
        modules: &[
            "filters", "copy", "driver", "io", "error", "units", "limits",
        ],
        never: &["qapi::", "block::graph"],
    },
    Layer {
        place: "src/block/formats/qcow2",
        modules: &[
            "formats", "driver", "events", "io", "error", "units", "limits", "open",
        ],
        never: &["formats::raw", "qapi::"],
    },
    Layer {
        place: "src/block/formats/raw.rs",
        modules: &["driver", "io", "error", "units", "limits", "open"],
        never: &["qapi::"],
    },
    Layer {
        place: "src/block/protocols",
        modules: &[
            "protocols",
            "driver",
            "io",
            "error",
            "units",
            "limits",
            "open",
        ],
        never: &["qapi::"],
    },
    Layer {
        place: "src/block/crashlab",
        modules: &[
            "crashlab",
            "formats",
            "protocols",
            "driver",
            "io",
            "error",
            "units",
        ],
        never: &["qapi::", "block::graph"],
    },
    Layer {
        place: "src/block/io",
        modules: &["io", "error", "units", "limits"],
        never: &["qapi::"],
    },
    Layer {
        place: "src/qapi",
        modules: &["*"],
        never: &["block::", "tokio::"],
    },
    Layer {
        place: "qapi-gen/src",
        modules: &["*"],
        never: &["qapi::", "block::", "tokio::"],
    },
];

/// Functions that are longer than a screen. May shrink, must not grow.
const LONG_FUNCTIONS: &[&str] = &[];

const FUNCTION_LINES: usize = 70;
const FILE_LINES: usize = 800;
/// Code is kept to 100 by rustfmt; prose and strings may take this much.
const LINE_WIDTH: usize = 140;

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every file of the project with this ending, as (path from the root, text), in order.
fn files(ending: &str) -> Vec<(String, String)> {
    fn walk(dir: &Path, ending: &str, found: &mut Vec<PathBuf>) {
        for entry in fs::read_dir(dir).expect("a readable folder").flatten() {
            let path = entry.path();
            let name = entry.file_name().to_string_lossy().into_owned();
            if path.is_dir() {
                if name != "target" && !name.starts_with('.') {
                    walk(&path, ending, found);
                }
            } else if name.ends_with(ending) {
                found.push(path);
            }
        }
    }
    let mut found = Vec::new();
    walk(&root(), ending, &mut found);
    found.sort();
    found
        .into_iter()
        .map(|path| {
            let name = path
                .strip_prefix(root())
                .expect("inside")
                .to_string_lossy()
                .into_owned();
            (name, fs::read_to_string(&path).expect("UTF-8 text"))
        })
        .collect()
}

fn is_test(path: &str) -> bool {
    path.starts_with("tests/")
        || path.contains("/tests/")
        || path.ends_with("tests.rs")
        || path.ends_with("/testing.rs")
}

/// The text without line comments, so that prose may name what code must not.
fn code_of(text: &str) -> String {
    text.lines()
        .map(|line| line.split("//").next().unwrap_or_default())
        .collect::<Vec<_>>()
        .join("\n")
}

fn report(problems: Vec<String>) {
    assert!(problems.is_empty(), "\n{}", problems.join("\n"));
}

#[test]
fn layers_use_only_what_lies_below() {
    let sources = files(".rs");
    assert!(
        sources.len() > 10,
        "found only {} source files",
        sources.len()
    );
    let mut problems = Vec::new();
    for layer in LAYERS {
        let inside: Vec<_> = sources
            .iter()
            .filter(|(path, _)| path.starts_with(layer.place) && !is_test(path))
            .collect();
        for (path, text) in inside {
            let code = code_of(text);
            let code = code.split("\n#[cfg(test)]").next().unwrap_or_default();
            for never in layer.never {
                let named = code.match_indices(never).any(|(at, _)| {
                    !code[..at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':')
                });
                if named {
                    problems.push(format!("{path}: must never know {never}"));
                }
            }
            for module in modules_used(code) {
                if layer.modules != ["*"] && !layer.modules.contains(&module.as_str()) {
                    problems.push(format!(
                        "{path}: uses crate::{module}, which lies not below"
                    ));
                }
            }
        }
    }
    report(problems);
}

/// The first segments after every `crate::`, those in braces too.
fn modules_used(code: &str) -> Vec<String> {
    let mut used = Vec::new();
    for (at, found) in code.match_indices("crate::") {
        let rest = &code[at + found.len()..];
        let names: Vec<&str> = match rest.strip_prefix('{') {
            Some(list) => list
                .split('}')
                .next()
                .unwrap_or_default()
                .split(',')
                .collect(),
            None => vec![rest],
        };
        for name in names {
            let is_name = |c: &char| c.is_alphanumeric() || *c == '_';
            let module: String = name.trim().chars().take_while(is_name).collect();
            if !module.is_empty() {
                used.push(module);
            }
        }
    }
    used
}

#[test]
fn files_and_functions_fit() {
    let mut problems = Vec::new();
    let mut long = Vec::new();
    for (path, text) in files(".rs") {
        let lines: Vec<&str> = text.lines().collect();
        if lines.len() > FILE_LINES {
            problems.push(format!(
                "{path}: {} lines; is there a second noun in it?",
                lines.len()
            ));
        }
        for (at, line) in lines.iter().enumerate() {
            if line.chars().count() > LINE_WIDTH {
                problems.push(format!(
                    "{path}:{}: wider than {LINE_WIDTH} columns",
                    at + 1
                ));
            }
        }
        if is_test(&path) {
            continue;
        }
        for (name, length) in functions(&lines) {
            let id = format!("{path} {name}");
            if length > FUNCTION_LINES && !LONG_FUNCTIONS.contains(&id.as_str()) {
                problems.push(format!(
                    "{id}: {length} lines; {FUNCTION_LINES} fit a screen"
                ));
            }
            if length > FUNCTION_LINES {
                long.push(id);
            }
        }
    }
    for id in LONG_FUNCTIONS {
        if !long.iter().any(|found| found == id) {
            problems.push(format!("{id}: fits now; take it off the list"));
        }
    }
    report(problems);
}

/// (name, lines) of every function; relies on rustfmt's indentation.
fn functions(lines: &[&str]) -> Vec<(String, usize)> {
    let mut found = Vec::new();
    for (start, line) in lines.iter().enumerate() {
        let trimmed = line.trim_start();
        let indent = line.len() - trimmed.len();
        let Some(at) = trimmed.find("fn ") else {
            continue;
        };
        let before = &trimmed[..at];
        let is_head = before.split_whitespace().all(|word| {
            word.starts_with("pub")
                || word.starts_with("in")
                || matches!(word, "async" | "const" | "unsafe" | "extern" | "\"C\"")
        });
        if !is_head {
            continue;
        }
        let name: String = trimmed[at + 3..]
            .chars()
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect();
        let at_same_depth = |line: &&str| line.len() - line.trim_start().len() == indent;
        let opens = lines[start..]
            .iter()
            .position(|line| at_same_depth(line) && (line.ends_with(['{', ';', '}'])));
        let Some(opens) = opens.filter(|opens| lines[start + opens].ends_with('{')) else {
            continue;
        };
        let close = format!("{}}}", " ".repeat(indent));
        if let Some(body) = lines[start + opens..]
            .iter()
            .position(|line| *line == close)
        {
            found.push((name, opens + body + 1));
        }
    }
    found
}

#[test]
fn unsafe_stands_in_the_io_module_only_and_nothing_is_left_undone() {
    let mut problems = Vec::new();
    for (path, text) in files(".rs") {
        if path == "tests/it/tidy.rs" {
            continue;
        }
        let code = code_of(&text);
        let has = |word: &str| {
            code.match_indices(word).any(|(at, _)| {
                let before = code[..at].chars().next_back().unwrap_or(' ');
                !(before.is_alphanumeric() || before == '_' || before == '"')
            })
        };
        if !path.starts_with("src/block/io/")
            && (has("unsafe {") || has("unsafe fn") || has("unsafe impl"))
        {
            problems.push(format!("{path}: unsafe outside of block::io"));
        }
        for word in ["todo!(", "unimplemented!(", "#[ignore", "#[should_panic"] {
            if code.contains(word) {
                problems.push(format!("{path}: {word}"));
            }
        }
        let first = text
            .lines()
            .find(|line| !line.trim().is_empty())
            .unwrap_or_default();
        if !first.starts_with("//!") && !first.starts_with("// @generated") {
            problems.push(format!("{path}: does not begin by saying what it is for"));
        }
    }
    report(problems);
}

#[test]
fn the_map_names_only_what_exists() {
    let mut named = 0;
    let mut problems = Vec::new();
    let maps = [
        "docs/ARCHITECTURE.md",
        "docs/crash-safety.md",
        "docs/validation.md",
    ];
    for document in maps {
        let text = fs::read_to_string(root().join(document)).expect(document);
        for part in text.split('`').skip(1).step_by(2) {
            let is_path = !part.contains(|c: char| c.is_whitespace() || "<>*{}=:(".contains(c))
                && (part.contains('/') || part.ends_with(".rs") || part.ends_with(".md"));
            if is_path {
                named += 1;
                if !root().join(part).exists() {
                    problems.push(format!("{document} names {part}, which does not exist"));
                }
            }
        }
    }
    assert!(
        named > 10,
        "they name only {named} paths: is the quoting right?"
    );
    report(problems);
}

/// The functions that two pages name, by their path in the qcow2 driver.
#[test]
fn functions_and_tests_that_are_named_exist() {
    for page in ["docs/crash-safety.md", "docs/validation.md"] {
        check_functions(page);
    }
}

fn check_functions(page: &str) {
    let driver = root().join("src/block/formats/qcow2");
    let text = fs::read_to_string(root().join(page)).expect(page);
    let mut named = 0;
    let mut problems = Vec::new();
    for part in text.split('`').skip(1).step_by(2) {
        let is_path = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || "_:".contains(c);
        let Some((module, function)) = part.rsplit_once("::").filter(|_| part.chars().all(is_path))
        else {
            continue;
        };
        named += 1;
        let module = module.replace("::", "/");
        let has = |file: String| {
            let text = fs::read_to_string(driver.join(file)).unwrap_or_default();
            ["(", "<"]
                .iter()
                .any(|next| text.contains(&format!("fn {function}{next}")))
        };
        if !has(format!("{module}.rs")) && !has(format!("{module}/mod.rs")) {
            problems.push(format!("{page} names {part}, which does not exist"));
        }
    }
    assert!(
        named > 20,
        "{page} names only {named} functions: is the quoting right?"
    );
    report(problems);
}

#[test]
fn the_project_names_no_machine() {
    let mut problems = Vec::new();
    for ending in [".rs", ".md", ".toml", ".json", ".hx", ".pest"] {
        for (path, text) in files(ending) {
            for (at, line) in text.lines().enumerate() {
                let home = ["/ro", "ot/"].concat();
                let work = ["/wo", "rk/"].concat();
                if line.contains(&home) || line.contains(&work) {
                    problems.push(format!("{path}:{}: a path of somebody's machine", at + 1));
                }
            }
        }
    }
    report(problems);
}
