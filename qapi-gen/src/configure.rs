//! `if` conditions: their value for a given set of identifiers, and whether one implies another.

use std::collections::BTreeSet;

use crate::ast::Cond;
use crate::limits::MAX_CONDITION_IDENTIFIERS;

/// The value of a condition. No condition is always true.
pub(crate) fn holds(cond: Option<&Cond>, defined: &dyn Fn(&str) -> bool) -> bool {
    match cond {
        None => true,
        Some(Cond::Is(name)) => defined(name),
        Some(Cond::Not(inner)) => !holds(Some(inner), defined),
        Some(Cond::All(parts)) => parts.iter().all(|part| holds(Some(part), defined)),
        Some(Cond::Any(parts)) => parts.iter().any(|part| holds(Some(part), defined)),
    }
}

/// Whether a use leaks.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Leak {
    /// Whenever the user is there, so is what it uses.
    None,
    /// With these identifiers defined (and no others) the user is there without it.
    With(Vec<String>),
    /// More identifiers than are tried.
    TooComplex,
}

/// Looks for an assignment under which all of `user` hold and `used` does not.
pub(crate) fn leak(user: &[Option<&Cond>], used: Option<&Cond>) -> Leak {
    let Some(used) = used else {
        return Leak::None;
    };
    if user.contains(&Some(used)) {
        return Leak::None;
    }
    let mut names = BTreeSet::new();
    collect(used, &mut names);
    for cond in user.iter().flatten() {
        collect(cond, &mut names);
    }
    if names.len() > MAX_CONDITION_IDENTIFIERS {
        return Leak::TooComplex;
    }
    let names: Vec<&str> = names.into_iter().collect();
    for assignment in 0_u32..1 << names.len() {
        let chosen: Vec<&str> = names
            .iter()
            .enumerate()
            .filter(|(bit, _)| assignment >> bit & 1 == 1)
            .map(|(_, name)| *name)
            .collect();
        let defined = |name: &str| chosen.contains(&name);
        if user.iter().all(|cond| holds(*cond, &defined)) && !holds(Some(used), &defined) {
            return Leak::With(chosen.into_iter().map(str::to_owned).collect());
        }
    }
    Leak::None
}

fn collect<'a>(cond: &'a Cond, names: &mut BTreeSet<&'a str>) {
    match cond {
        Cond::Is(name) => drop(names.insert(name)),
        Cond::Not(inner) => collect(inner, names),
        Cond::All(parts) | Cond::Any(parts) => {
            parts.iter().for_each(|part| collect(part, names));
        }
    }
}

/// A condition in words, for messages.
pub(crate) fn describe(cond: &Cond) -> String {
    let list = |parts: &[Cond], word: &str| {
        let parts: Vec<String> = parts.iter().map(describe).collect();
        format!("({})", parts.join(word))
    };
    match cond {
        Cond::Is(name) => name.clone(),
        Cond::Not(inner) => format!("not {}", describe(inner)),
        Cond::All(parts) => list(parts, " and "),
        Cond::Any(parts) => list(parts, " or "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn is(name: &str) -> Cond {
        Cond::Is(name.to_owned())
    }

    #[test]
    fn evaluation_follows_the_operators() {
        let cond = Cond::All(vec![is("A"), Cond::Not(Box::new(is("B")))]);
        assert!(holds(Some(&cond), &|name| name == "A"));
        assert!(!holds(Some(&cond), &|_| true));
        assert!(holds(None, &|_| false));
        assert_eq!(describe(&cond), "(A and not B)");
    }

    #[test]
    fn a_leak_comes_with_an_example() {
        let either = Cond::Any(vec![is("A"), is("B")]);
        assert_eq!(leak(&[Some(&is("A"))], Some(&either)), Leak::None);
        assert_eq!(
            leak(&[Some(&either)], Some(&is("A"))),
            Leak::With(vec!["B".to_owned()])
        );
        assert_eq!(leak(&[None], Some(&is("A"))), Leak::With(Vec::new()));
        let both = Cond::All(vec![is("A"), is("B")]);
        assert_eq!(
            leak(&[Some(&is("A")), Some(&is("B"))], Some(&both)),
            Leak::None
        );
    }

    #[test]
    fn too_many_identifiers_are_refused() {
        let many: Vec<Cond> = (0..13).map(|n| is(&format!("C{n}"))).collect();
        let any = Cond::Any(many);
        assert_eq!(leak(&[None], Some(&any)), Leak::TooComplex);
        assert_eq!(leak(&[Some(&any)], Some(&any)), Leak::None);
    }
}
