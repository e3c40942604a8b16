//! The dialect of 2012 to 2014: rewritten into the modern one, tree by tree, so that no later pass
//! knows of it.
//!
//! ```text
//! { 'type': 'A', .. }                          struct
//! { 'union': 'U', 'data': .. }                 union, enum UKind, a wrapper struct per branch
//! { 'union': 'U', 'discriminator': {}, .. }    alternate
//! 'member': { 'nested': 'int' }                member of a struct of its own
//! '**', 'visitor', 'dict'                      any
//! 'gen': 'no', 'success-response': 'no'        false
//! ```
//!
//! Names follow no rules yet, commands return what they like, and comments are convention only:
//! `##` begins nothing.

use crate::ir::Span;
use crate::parse::{Name, Node, Value};

type Members = Vec<(Name, Node)>;

/// The text with every comment a plain one; places stay as they are.
pub(crate) fn plain_comments(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for line in text.split_inclusive('\n') {
        let body = line.trim_start_matches([' ', '\t', '#']);
        let head = &line[..line.len() - body.len()];
        let mut hashes = 0;
        for c in head.chars() {
            hashes += usize::from(c == '#');
            out.push(if c == '#' && hashes > 1 { ' ' } else { c });
        }
        out.push_str(body);
    }
    out
}

/// The lines of the comment that ends right above the byte `end`.
pub(crate) fn comment_above(text: &str, end: usize) -> Option<(usize, usize)> {
    let above = text.get(..end)?;
    // The definition starts a line of its own.
    let stop = above.rfind('\n').map_or(0, |at| at + 1);
    let mut start = stop;
    while start > 0 {
        let previous = above[..start - 1].rfind('\n').map_or(0, |at| at + 1);
        if !above[previous..start].starts_with('#') {
            break;
        }
        start = previous;
    }
    (start < stop).then_some((start, stop))
}

/// Rewrites an expression; definitions that it implies come first.
pub(crate) fn modernise(node: Node) -> Vec<Node> {
    let Value::Object(mut members) = node.value else {
        return vec![node];
    };
    let mut implied = Vec::new();
    for (key, value) in &mut members {
        match key.text.as_str() {
            "type" => key.text = "struct".to_owned(),
            "gen" | "success-response" if matches!(&value.value, Value::String(_)) => {
                value.value = Value::Bool(false);
            }
            "returns" => pseudo_type(value),
            _ => {}
        }
    }
    let owner = members.iter().find_map(|(key, value)| match &value.value {
        Value::String(name)
            if ["struct", "union", "command", "enum"].contains(&key.text.as_str()) =>
        {
            Some(name.clone())
        }
        _ => None,
    });
    let is_union = members.iter().any(|(key, _)| key.text == "union");
    for (key, value) in &mut members {
        if key.text == "data" && !is_union {
            hoist(value, owner.as_deref().unwrap_or(""), &mut implied);
        }
    }
    let rewritten = match owner {
        Some(owner) if is_union => union(&owner, members, node.span, &mut implied),
        _ => members,
    };
    implied.push(Node {
        value: Value::Object(rewritten),
        span: node.span,
    });
    implied
}

/// Gives each nested object a struct of its own, and pseudo types their modern name.
fn hoist(data: &mut Node, owner: &str, implied: &mut Vec<Node>) {
    let Value::Object(members) = &mut data.value else {
        return;
    };
    for (key, value) in members {
        match &mut value.value {
            Value::Object(_) => {
                let name = format!("{owner}{}", camel(&key.text));
                hoist(value, &name, implied);
                let span = value.span;
                let nested = std::mem::replace(value, string(&name, span));
                implied.push(object(
                    span,
                    vec![("struct", string(&name, span)), ("data", nested)],
                ));
            }
            _ => pseudo_type(value),
        }
    }
}

/// The types for which there was no marshaller are `any` today.
fn pseudo_type(node: &mut Node) {
    if let Value::String(ty) = &mut node.value
        && ["**", "visitor", "dict"].contains(&ty.as_str())
    {
        "any".clone_into(ty);
    }
}

/// A union: flat ones stay, anonymous ones become alternates, simple ones flat.
fn union(owner: &str, mut members: Members, span: Span, implied: &mut Vec<Node>) -> Members {
    let Some(at) = members
        .iter()
        .position(|(key, _)| key.text == "discriminator")
    else {
        return simple_union(owner, members, span, implied);
    };
    if matches!(&members[at].1.value, Value::Object(keys) if keys.is_empty()) {
        members.remove(at);
        for (key, _) in &mut members {
            if key.text == "union" {
                key.text = "alternate".to_owned();
            }
        }
    }
    members
}

/// On the wire a simple union is `{ 'type': BRANCH, 'data': VALUE }` and the members of its base:
/// an enum of the branches, a base with `type`, and for each branch a struct with `data`.
fn simple_union(owner: &str, mut members: Members, span: Span, implied: &mut Vec<Node>) -> Members {
    let kind = format!("{owner}Kind");
    let mut values = Vec::new();
    let data = members.iter_mut().find(|(key, _)| key.text == "data");
    if let Some((
        _,
        Node {
            value: Value::Object(branches),
            ..
        },
    )) = data
    {
        for (branch, ty) in branches {
            let place = branch.span;
            values.push(string(&branch.text, place));
            let name = format!("{owner}{}Wrapper", camel(&branch.text));
            let ty = std::mem::replace(ty, string(&name, ty.span));
            let data = object(place, vec![("data", ty)]);
            implied.push(object(
                place,
                vec![("struct", string(&name, place)), ("data", data)],
            ));
        }
    }
    let values = Node {
        value: Value::Array(values),
        span,
    };
    implied.push(object(
        span,
        vec![("enum", string(&kind, span)), ("data", values)],
    ));
    let tag = object(span, vec![("type", string(&kind, span))]);
    let base = match members.iter().position(|(key, _)| key.text == "base") {
        Some(at) => {
            let (_, base) = members.remove(at);
            let name = format!("{owner}Base");
            let place = base.span;
            let common = vec![
                ("struct", string(&name, place)),
                ("base", base),
                ("data", tag),
            ];
            implied.push(object(place, common));
            string(&name, place)
        }
        None => tag,
    };
    let key = |text: &str| Name {
        text: text.to_owned(),
        span,
    };
    members.push((key("base"), base));
    members.push((key("discriminator"), string("type", span)));
    members
}

fn string(text: &str, span: Span) -> Node {
    Node {
        value: Value::String(text.to_owned()),
        span,
    }
}

fn object(span: Span, members: Vec<(&str, Node)>) -> Node {
    let named = |(key, node): (&str, Node)| {
        (
            Name {
                text: key.to_owned(),
                span,
            },
            node,
        )
    };
    Node {
        value: Value::Object(members.into_iter().map(named).collect()),
        span,
    }
}

/// `host_device` as part of a type name: `HostDevice`.
fn camel(name: &str) -> String {
    name.split(|c: char| !c.is_ascii_alphanumeric())
        .map(|word| {
            let (first, rest) = word.split_at(word.len().min(1));
            format!("{}{rest}", first.to_ascii_uppercase())
        })
        .collect()
}
