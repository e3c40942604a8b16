//! Types: structs, enums, unions and alternates, each with a plain decoder and encoder.

use proc_macro2::{Ident, TokenStream};
use quote::{format_ident, quote};

use super::members::{Scope, Use, whole_object};
use super::names::{snake_name, variant_name};
use super::plan::Plan;
use super::rustdoc;
use crate::ir::{Alternative, Branch, Builtin, DefId, EnumValue, Kind, Member, Type, UnionDef};

/// An enum, with its names.
pub(super) fn enumeration(plan: &Plan<'_>, id: DefId, values: &[EnumValue]) -> TokenStream {
    let name = plan.name(id);
    let doc = rustdoc::definition(plan, id);
    let variants: Vec<Ident> = values
        .iter()
        .map(|value| variant_name(&value.name))
        .collect();
    let wire: Vec<&String> = values.iter().map(|value| &value.name).collect();
    let docs = values.iter().map(rustdoc::value);
    let count = values.len();
    quote! {
        #doc
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum #name { #(#docs #variants,)* }

        impl #name {
            /// Every value, in the order of the schema.
            pub const ALL: [Self; #count] = [#(Self::#variants),*];

            /// The wire name.
            pub fn as_str(self) -> &'static str {
                match self { #(Self::#variants => #wire,)* }
            }

            /// The value of a wire name.
            pub fn from_name(name: &str) -> Option<Self> {
                match name {
                    #(#wire => Some(Self::#variants),)*
                    _ => None,
                }
            }

            /// Decodes a value that stands at `at`: a string that is one of the names.
            pub fn decode(value: Value, at: &Path<'_>) -> Decoded<Self> {
                decode::name(value, at, Self::from_name)
            }

            /// The wire form.
            pub fn into_value(self) -> Value {
                Value::from(self.as_str())
            }
        }
    }
}

/// A struct; the members of its base are its own.
pub(super) fn structure(plan: &Plan<'_>, id: DefId) -> TokenStream {
    let uses = Use {
        plan,
        scope: Scope::Types,
        user: Some(id),
    };
    let members = plan.schema.flattened_members(id);
    uses.structure(plan.name(id), &rustdoc::definition(plan, id), &members)
}

/// The name of the enum with a union's branches.
pub(super) fn branch_name(plan: &Plan<'_>, id: DefId) -> Ident {
    format_ident!("{}Branch", plan.name(id))
}

/// A union: a struct of the common members, in which the discriminator is an enum that holds the
/// rest. So the two cannot disagree.
pub(super) fn union(plan: &Plan<'_>, id: DefId, def: &UnionDef) -> TokenStream {
    let uses = Use {
        plan,
        scope: Scope::Types,
        user: Some(id),
    };
    let name = plan.name(id);
    let members = plan.schema.flattened_members(id);
    let branches = branch_name(plan, id);
    let fields = members.iter().map(|member| {
        let doc = rustdoc::member(member);
        let field = snake_name(&member.name);
        let ty = if member.name == def.discriminator {
            quote!(#branches)
        } else {
            uses.member_type(member)
        };
        quote!(#doc pub #field: #ty,)
    });
    let doc = rustdoc::definition(plan, id);
    let decode_members = decode_union(&uses, def, &branches, &members);
    let encode_members = encode_union(&uses, def, &branches, &members);
    let branch_enum = branch_enum(&uses, id, def, &branches);
    let whole = whole_object();
    quote! {
        #doc
        #[derive(Debug, Clone, PartialEq)]
        pub struct #name { #(#fields)* }

        impl #name {
            #whole
            #decode_members
            #encode_members
        }

        #branch_enum
    }
}

/// The tag is decoded in its place among the common members, its branch after all of them: that is
/// the order in which complaints are due.
fn decode_union(
    uses: &Use<'_>,
    def: &UnionDef,
    branches: &Ident,
    members: &[&Member],
) -> TokenStream {
    let fields: Vec<Ident> = members
        .iter()
        .map(|member| snake_name(&member.name))
        .collect();
    let from = free_name("members", &fields);
    let taken = members.iter().zip(&fields).map(|(member, field)| {
        let take = uses.take(&from, member);
        quote!(let #field = #take;)
    });
    let tag = snake_name(&def.discriminator);
    let tag_enum = uses.name(def.tag_enum);
    let arms = def.branches.iter().map(|branch| {
        let variant = variant_name(&branch.value);
        let decoded = branch.ty.map(|ty| {
            let name = uses.name(ty);
            let decoded = quote!(#name::decode_members(#from)?);
            if uses.is_boxed(ty) {
                quote!((Box::new(#decoded)))
            } else {
                quote!((#decoded))
            }
        });
        quote!(#tag_enum::#variant => #branches::#variant #decoded,)
    });
    quote! {
        /// Takes the members of this type out of an object that may have others.
        pub fn decode_members(#from: &mut Members<'_>) -> Decoded<Self> {
            #(#taken)*
            let #tag = match #tag { #(#arms)* };
            Ok(Self { #(#fields),* })
        }
    }
}

fn encode_union(
    uses: &Use<'_>,
    def: &UnionDef,
    branches: &Ident,
    members: &[&Member],
) -> TokenStream {
    let tag = snake_name(&def.discriminator);
    let put = members.iter().map(|member| {
        if member.name == def.discriminator {
            let wire = &member.name;
            quote!(encode::member(object, #wire, self.#tag.tag().into_value());)
        } else {
            uses.put(member)
        }
    });
    let arms = def.branches.iter().map(|branch| {
        let variant = variant_name(&branch.value);
        match branch.ty {
            Some(_) => quote!(#branches::#variant(branch) => branch.encode_members(object),),
            None => quote!(#branches::#variant => {}),
        }
    });
    quote! {
        /// Adds the members of this type to an object.
        pub fn encode_members(self, object: &mut Object) {
            #(#put)*
            match self.#tag { #(#arms)* }
        }
    }
}

fn branch_enum(uses: &Use<'_>, id: DefId, def: &UnionDef, name: &Ident) -> TokenStream {
    let tag_enum = uses.name(def.tag_enum);
    let value_doc = |branch: &Branch| match &uses.plan.schema.def(def.tag_enum).kind {
        Kind::Enum(values) => values
            .iter()
            .find(|value| value.name == branch.value)
            .map(rustdoc::value),
        _ => None,
    };
    let (mut variants, mut tags) = (TokenStream::new(), TokenStream::new());
    for branch in &def.branches {
        let variant = variant_name(&branch.value);
        let doc = value_doc(branch);
        let (content, pattern) = match branch.ty {
            Some(ty) => {
                let content = uses.ty(&Type::Defined(ty));
                (quote!((#content)), quote!((_)))
            }
            None => (TokenStream::new(), TokenStream::new()),
        };
        variants.extend(quote!(#doc #variant #content,));
        tags.extend(quote!(Self::#variant #pattern => #tag_enum::#variant,));
    }
    let summary = format!(
        " What a [`{}`] has besides its common members, by its `{}`.",
        uses.plan.name(id),
        def.discriminator
    );
    quote! {
        #[doc = #summary]
        #[derive(Debug, Clone, PartialEq)]
        pub enum #name { #variants }

        impl #name {
            /// The discriminator's value.
            pub fn tag(&self) -> #tag_enum {
                match *self { #tags }
            }
        }
    }
}

/// An alternate: an enum, told apart by the kind of JSON value.
pub(super) fn alternate(plan: &Plan<'_>, id: DefId, branches: &[Alternative]) -> TokenStream {
    let uses = Use {
        plan,
        scope: Scope::Types,
        user: Some(id),
    };
    let name = plan.name(id);
    let doc = rustdoc::definition(plan, id);
    let (mut variants, mut decoded, mut encoded) =
        (TokenStream::new(), TokenStream::new(), TokenStream::new());
    for branch in branches {
        let variant = variant_name(&branch.name);
        let doc = rustdoc::alternative(branch);
        let kind = value_kind(plan, &branch.ty);
        if branch.ty == Type::Builtin(Builtin::Null) {
            variants.extend(quote!(#doc #variant,));
            decoded.extend(quote!(#kind => Ok(Self::#variant),));
            encoded.extend(quote!(Self::#variant => Value::Null,));
            continue;
        }
        let ty = uses.ty(&branch.ty);
        let value = uses.encoded(&branch.ty, &quote!(value));
        variants.extend(quote!(#doc #variant(#ty),));
        let inner = match &branch.ty {
            Type::Defined(id) if uses.is_boxed(*id) => {
                let inner = uses.name(*id);
                quote!(#inner::decode(value, at).map(Box::new).map(Self::#variant))
            }
            Type::Array(element) => {
                let element = uses.decoder(element);
                quote!(decode::list(value, at, #element).map(Self::#variant))
            }
            ty => {
                let decoder = uses.decoder(ty);
                quote!(#decoder(value, at).map(Self::#variant))
            }
        };
        decoded.extend(quote!(#kind => #inner,));
        encoded.extend(quote!(Self::#variant(value) => #value,));
    }
    let wire = &plan.schema.def(id).name;
    quote! {
        #doc
        #[derive(Debug, Clone, PartialEq)]
        pub enum #name { #variants }

        impl #name {
            /// Decodes a value that stands at `at`: its kind says which branch it is.
            pub fn decode(value: Value, at: &Path<'_>) -> Decoded<Self> {
                match value {
                    #decoded
                    _ => Err(at.wrong_type(#wire)),
                }
            }

            /// The wire form.
            pub fn into_value(self) -> Value {
                match self { #encoded }
            }
        }
    }
}

/// The pattern of the JSON values that belong to an alternate's branch.
fn value_kind(plan: &Plan<'_>, ty: &Type) -> TokenStream {
    match ty {
        Type::Builtin(Builtin::Str | Builtin::QType) => quote!(Value::String(_)),
        Type::Builtin(Builtin::Bool) => quote!(Value::Bool(_)),
        Type::Builtin(Builtin::Null) => quote!(Value::Null),
        // The language does not allow it here; every kind would be its.
        Type::Builtin(Builtin::Any) => quote!(_),
        Type::Builtin(_) => quote!(Value::Number(_)),
        Type::Array(_) => quote!(Value::Array(_)),
        Type::Defined(id) => match plan.schema.def(*id).kind {
            Kind::Enum(_) => quote!(Value::String(_)),
            _ => quote!(Value::Object(_)),
        },
    }
}

/// A name for a local variable that no field has.
fn free_name(wish: &str, fields: &[Ident]) -> Ident {
    let mut name = wish.to_owned();
    while fields.iter().any(|field| *field == name) {
        name.push('_');
    }
    format_ident!("{name}")
}
