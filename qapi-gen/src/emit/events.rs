//! Events: a struct for each, and their encoding.

use proc_macro2::TokenStream;
use quote::quote;

use super::members::{Scope, Use};
use super::plan::Plan;
use super::rustdoc;
use crate::ir::{Args, DefId, EventDef};

/// The struct of one event.
pub(super) fn event(plan: &Plan<'_>, id: DefId, def: &EventDef) -> TokenStream {
    let uses = Use {
        plan,
        scope: Scope::Inner,
        user: None,
    };
    let name = plan.name(id);
    let wire = &plan.schema.def(id).name;
    let doc = rustdoc::definition(plan, id);
    let common = quote! {
        /// The wire name.
        pub const NAME: &'static str = #wire;
    };
    if let (Args::Named(data), true) = (&def.args, def.boxed) {
        let data = uses.name(*data);
        return quote! {
            #doc
            #[derive(Debug, Clone, PartialEq)]
            pub struct #name(
                /// The data.
                pub #data,
            );

            impl #name {
                #common

                /// The wire form of the data.
                pub fn into_data(self) -> Object {
                    let mut object = Object::new();
                    self.0.encode_members(&mut object);
                    object
                }
            }
        };
    }
    let members = plan.argument_members(&def.args);
    let fields = uses.fields(&members);
    let put: Vec<TokenStream> = members.iter().map(|member| uses.put(member)).collect();
    let data = if members.is_empty() {
        quote!(Object::new())
    } else {
        quote! {
            let mut data = Object::new();
            let object = &mut data;
            #(#put)*
            data
        }
    };
    quote! {
        #doc
        #[derive(Debug, Clone, PartialEq)]
        pub struct #name { #fields }

        impl #name {
            #common

            /// The wire form of the data.
            pub fn into_data(self) -> Object { #data }
        }
    }
}

/// The module around a schema file's events.
pub(super) fn module(plan: &Plan<'_>, events: TokenStream) -> TokenStream {
    if events.is_empty() {
        return events;
    }
    let runtime = &plan.runtime;
    quote! {
        /// The events of this schema file.
        pub mod events {
            use super::super::types;
            use #runtime::{encode, Object, QType, Value};
            #events
        }
    }
}
