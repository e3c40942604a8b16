//! `mod.rs`: the modules, what they export, and the dispatch table.

use std::collections::BTreeMap;

use proc_macro2::{Ident, TokenStream};
use quote::quote;

use super::commands::marshaller_name;
use super::plan::Plan;
use super::types::branch_name;
use super::{OutputFile, format_file, rustdoc};
use crate::ir::{Args, DefId, Kind};

/// The root of the generated modules.
pub(super) fn mod_file(plan: &Plan<'_>) -> OutputFile {
    let modules = modules(plan);
    let exports = exports(plan);
    let events = event_enum(plan);
    let table = command_table(plan);
    let body = quote!(#modules #exports #events #table);
    let source = plan
        .modules
        .first()
        .map_or("an empty schema", |module| module.source.as_str());
    OutputFile {
        path: "mod.rs".to_owned(),
        text: format_file(source, body),
    }
}

fn modules(plan: &Plan<'_>) -> TokenStream {
    let mut all = TokenStream::new();
    for (at, module) in plan.modules.iter().enumerate() {
        if plan.has_definitions(at) {
            let name = &module.rust;
            let doc = rustdoc::text(&format!("What {} defines.", module.source));
            all.extend(quote!(#doc pub mod #name;));
        }
    }
    let introspection = rustdoc::text("The schema in its wire form.");
    quote!(#all #introspection pub mod introspection;)
}

/// Everything by its kind, wherever it is defined: `types::BlockdevOptions`.
fn exports(plan: &Plan<'_>) -> TokenStream {
    let mut types: BTreeMap<usize, Vec<Ident>> = BTreeMap::new();
    let mut commands: BTreeMap<usize, Vec<Ident>> = BTreeMap::new();
    let mut events: BTreeMap<usize, Vec<Ident>> = BTreeMap::new();
    let mut handlers: BTreeMap<usize, Vec<Ident>> = BTreeMap::new();
    for (at, def) in plan.schema.definitions.iter().enumerate() {
        let id = DefId(at);
        let name = plan.name(id).clone();
        match &def.kind {
            Kind::Command(command) => {
                let trait_name = plan.modules[def.module].handler_trait.clone();
                handlers.insert(def.module, vec![trait_name]);
                let no_members = plan.argument_members(&command.args).is_empty();
                let boxed = command.boxed && matches!(command.args, Args::Named(_));
                if command.generate && (boxed || !no_members) {
                    commands.entry(def.module).or_default().push(name);
                }
            }
            Kind::Event(_) => events.entry(def.module).or_default().push(name),
            Kind::Union(_) => {
                let module = types.entry(def.module).or_default();
                module.push(name);
                module.push(branch_name(plan, id));
            }
            _ => types.entry(def.module).or_default().push(name),
        }
    }
    let lines = |inner: Option<&str>, all: &BTreeMap<usize, Vec<Ident>>| -> TokenStream {
        let inner = inner.map(|name| {
            let name = quote::format_ident!("{name}");
            quote!(::#name)
        });
        all.iter()
            .map(|(module, names)| {
                let module = &plan.modules[*module].rust;
                quote!(pub use super::#module #inner::{#(#names),*};)
            })
            .collect()
    };
    let types = lines(None, &types);
    let commands = lines(Some("commands"), &commands);
    let events = lines(Some("events"), &events);
    let handler_names: Vec<&Ident> = handlers.values().flatten().collect();
    let handlers = lines(Some("handlers"), &handlers);
    quote! {
        /// All types of the schema.
        pub mod types { #types }
        /// The arguments of all commands.
        pub mod commands { #commands }
        /// All events.
        pub mod events { #events }
        /// All handler traits.
        pub mod handlers {
            #handlers

            /// Handlers of every command. A type that implements the traits above has this one.
            pub trait Handlers<Cx>: #(#handler_names<Cx> +)* {}

            impl<Cx, H: #(#handler_names<Cx> +)*> Handlers<Cx> for H {}
        }
    }
}

/// The enum of all events.
fn event_enum(plan: &Plan<'_>) -> TokenStream {
    let events: Vec<(&Ident, TokenStream)> = plan
        .schema
        .definitions
        .iter()
        .enumerate()
        .filter(|(_, def)| matches!(def.kind, Kind::Event(_)))
        .map(|(at, def)| {
            (
                plan.name(DefId(at)),
                rustdoc::text(&format!("`{}`.", def.name)),
            )
        })
        .collect();
    if events.is_empty() {
        return TokenStream::new();
    }
    let names: Vec<&Ident> = events.iter().map(|(name, _)| *name).collect();
    let docs = events.iter().map(|(_, doc)| doc);
    let runtime = &plan.runtime;
    quote! {
        /// Any event.
        #[derive(Debug, Clone, PartialEq)]
        pub enum Event { #(#docs #names(events::#names),)* }

        impl Event {
            /// The wire name.
            pub fn name(&self) -> &'static str {
                match self { #(Event::#names(_) => events::#names::NAME,)* }
            }

            /// The wire form of the data.
            pub fn into_data(self) -> #runtime::Object {
                match self { #(Event::#names(event) => event.into_data(),)* }
            }

            /// The whole message.
            pub fn into_value(self, at: #runtime::event::Timestamp) -> #runtime::Value {
                #runtime::event::message(self.name(), self.into_data(), at)
            }
        }

        #(
            impl From<events::#names> for Event {
                fn from(event: events::#names) -> Self {
                    Event::#names(event)
                }
            }
        )*
    }
}

/// The sorted names and the table in the same order.
fn command_table(plan: &Plan<'_>) -> TokenStream {
    let commands = plan.sorted_commands();
    let names: Vec<&String> = commands
        .iter()
        .map(|id| &plan.schema.def(*id).name)
        .collect();
    let runtime = &plan.runtime;
    let entries = commands.iter().map(|id| entry(plan, *id));
    let count = commands.len();
    quote! {
        /// The names of all commands, sorted.
        pub const COMMAND_NAMES: [&str; #count] = [#(#names),*];

        const _: () = assert!(
            #runtime::dispatch::is_sorted(&COMMAND_NAMES),
            "the table is searched by halving"
        );

        /// The command table for handlers `H` that act on a `Cx`, in the order of
        /// [`COMMAND_NAMES`].
        pub const fn commands<Cx: Sync + 'static, H: handlers::Handlers<Cx> + 'static>()
        -> &'static [#runtime::dispatch::Entry<Cx>] {
            use #runtime::dispatch::{Call, CommandFlags, Entry};
            const { &[#(#entries),*] }
        }
    }
}

fn entry(plan: &Plan<'_>, id: DefId) -> TokenStream {
    let def = plan.schema.def(id);
    let Kind::Command(command) = &def.kind else {
        unreachable!("sorted_commands() gives commands only");
    };
    let name = &def.name;
    let features = def.features.iter().map(|feature| &feature.name);
    let module = &plan.modules[def.module].rust;
    let marshaller = marshaller_name(name);
    let call = if command.allow_oob {
        quote!(Call::OutOfBand(#module::handlers::#marshaller::<Cx, H>))
    } else {
        quote!(Call::InBand(#module::handlers::#marshaller::<Cx, H>))
    };
    let (allow_oob, allow_preconfig) = (command.allow_oob, command.allow_preconfig);
    let no_success_response = !command.success_response;
    quote! {
        Entry {
            name: #name,
            flags: CommandFlags {
                allow_oob: #allow_oob,
                allow_preconfig: #allow_preconfig,
                no_success_response: #no_success_response,
            },
            features: &[#(#features),*],
            call: #call,
        }
    }
}
