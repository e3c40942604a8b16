//! Commands: argument structs, handler traits and marshallers.

use proc_macro2::TokenStream;
use quote::{format_ident, quote};

use super::members::{Scope, Use};
use super::names::snake_name;
use super::plan::Plan;
use super::rustdoc;
use crate::ir::{Args, CommandDef, DefId, Member};

/// What the commands of one schema file add up to.
#[derive(Default)]
pub(super) struct Commands {
    structs: TokenStream,
    methods: TokenStream,
    marshallers: TokenStream,
}

/// How a handler gets its arguments.
enum Passed<'s> {
    /// There are none.
    Nothing,
    /// As the object that came in; nothing is checked.
    Raw,
    /// As a struct of the command's own.
    Struct(Vec<&'s Member>),
    /// As one value of a type of the schema.
    Boxed(DefId),
}

fn passed<'s>(plan: &Plan<'s>, def: &'s CommandDef) -> Passed<'s> {
    match (&def.args, def.boxed) {
        _ if !def.generate => Passed::Raw,
        (Args::Named(id), true) => Passed::Boxed(*id),
        (args, _) => {
            let members = plan.argument_members(args);
            if members.is_empty() {
                Passed::Nothing
            } else {
                Passed::Struct(members)
            }
        }
    }
}

impl Commands {
    pub(super) fn add<'s>(&mut self, plan: &Plan<'s>, id: DefId, def: &'s CommandDef) {
        let uses = Use {
            plan,
            scope: Scope::Inner,
            user: None,
        };
        let name = plan.name(id);
        let passed = passed(plan, def);
        let wire = &plan.schema.def(id).name;
        let doc = rustdoc::text(&format!("Arguments of `{wire}`."));
        match &passed {
            Passed::Nothing | Passed::Raw => {}
            Passed::Struct(members) => {
                self.structs.extend(uses.structure(name, &doc, members));
            }
            Passed::Boxed(ty) => {
                let ty = uses.name(*ty);
                self.structs.extend(quote!(#doc pub type #name = #ty;));
            }
        }
        self.methods.extend(method(&uses, id, def, &passed));
        self.marshallers.extend(marshaller(&uses, id, def, &passed));
    }

    /// The modules `commands` and `handlers`, as far as there is something in them.
    pub(super) fn into_modules(self, plan: &Plan<'_>, module: usize) -> TokenStream {
        let Commands {
            structs,
            methods,
            marshallers,
        } = self;
        let runtime = &plan.runtime;
        let structs = (!structs.is_empty()).then(|| {
            quote! {
                /// The arguments of the commands of this schema file.
                pub mod commands {
                    use super::super::types;
                    use #runtime::decode::{self, Decoded, Members};
                    use #runtime::{encode, Object, Path, QType, Value};
                    #structs
                }
            }
        });
        let handlers = (!methods.is_empty()).then(|| {
            let name = &plan.modules[module].handler_trait;
            let doc = rustdoc::text(&format!(
                "Handlers of the commands of {}. `Cx` is what they act on.",
                plan.modules[module].source
            ));
            quote! {
                /// The handler trait of this schema file, and what calls it.
                pub mod handlers {
                    use std::future::Future;

                    use super::super::{commands, types};
                    use #runtime::decode;
                    use #runtime::dispatch::CallFuture;
                    use #runtime::{encode, Object, Path, QType, QmpError, Value};

                    #doc
                    pub trait #name<Cx> { #methods }

                    #marshallers
                }
            }
        });
        quote!(#structs #handlers)
    }
}

/// The type of a handler's result.
fn result_type(uses: &Use<'_>, def: &CommandDef) -> TokenStream {
    let ok = def
        .returns
        .as_ref()
        .map_or_else(|| quote!(()), |ty| uses.ty(ty));
    quote!(Result<#ok, QmpError>)
}

/// The handler. Out-of-band commands must not wait, so theirs cannot: it is no future.
fn method(uses: &Use<'_>, id: DefId, def: &CommandDef, passed: &Passed<'_>) -> TokenStream {
    let command = uses.plan.name(id);
    let name = snake_name(&uses.plan.schema.def(id).name);
    let doc = rustdoc::command(uses.plan, id);
    let args = match passed {
        Passed::Nothing => None,
        Passed::Raw => Some(quote!(, args: Object)),
        Passed::Struct(_) => Some(quote!(, args: commands::#command)),
        Passed::Boxed(ty) => {
            let ty = uses.name(*ty);
            Some(quote!(, args: #ty))
        }
    };
    let result = result_type(uses, def);
    let result = if def.allow_oob {
        result
    } else {
        quote!(impl Future<Output = #result> + Send)
    };
    quote!(#doc fn #name(cx: &Cx #args) -> #result;)
}

/// `marshal_input_<command>`: checks the arguments, then calls the handler.
fn marshaller(uses: &Use<'_>, id: DefId, def: &CommandDef, passed: &Passed<'_>) -> TokenStream {
    let plan = uses.plan;
    let wire = &plan.schema.def(id).name;
    let command = plan.name(id);
    let method = snake_name(wire);
    let name = marshaller_name(wire);
    let handler = &plan.modules[plan.schema.def(id).module].handler_trait;
    let (check, args) = match passed {
        Passed::Nothing => (quote!(decode::nothing(args)?;), None),
        Passed::Raw => (TokenStream::new(), Some(quote!(, args))),
        Passed::Struct(_) => (
            quote!(let args = commands::#command::decode(Value::Object(args), &Path::json())?;),
            Some(quote!(, args)),
        ),
        Passed::Boxed(ty) => {
            let ty = uses.name(*ty);
            (
                quote!(let args = #ty::decode(Value::Object(args), &Path::json())?;),
                Some(quote!(, args)),
            )
        }
    };
    let (bind, reply) = match &def.returns {
        Some(ty) => (quote!(returned), uses.encoded(ty, &quote!(returned))),
        None => (quote!(()), quote!(Value::Object(Object::new()))),
    };
    let doc = rustdoc::text(&format!("Checks the arguments of `{wire}` and runs it."));
    if def.allow_oob {
        quote! {
            #doc
            pub fn #name<Cx, H: #handler<Cx>>(cx: &Cx, args: Object) -> Result<Value, QmpError> {
                #check
                let #bind = H::#method(cx #args)?;
                Ok(#reply)
            }
        }
    } else {
        quote! {
            #doc
            pub fn #name<Cx: Sync, H: #handler<Cx> + 'static>(
                cx: &Cx,
                args: Object,
            ) -> Result<CallFuture<'_>, QmpError> {
                #check
                Ok(Box::pin(async move {
                    let #bind = H::#method(cx #args).await?;
                    Ok(#reply)
                }))
            }
        }
    }
}

/// `blockdev-add` is marshalled by `marshal_input_blockdev_add`.
pub(super) fn marshaller_name(wire: &str) -> proc_macro2::Ident {
    let wire = wire.replace(|c: char| !c.is_ascii_alphanumeric(), "_");
    format_ident!("marshal_input_{wire}")
}
