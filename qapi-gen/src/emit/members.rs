//! Members of object types: fields, and how they are decoded and encoded.

use proc_macro2::{Ident, TokenStream};
use quote::{format_ident, quote};

use super::names::snake_name;
use super::plan::Plan;
use super::rustdoc;
use crate::ir::{Builtin, DefId, Member, Type};

/// Where a type is named from.
#[derive(Clone, Copy)]
pub(super) enum Scope {
    /// From a module file, among the types.
    Types,
    /// From a module inside it, where the types stand under `types::`.
    Inner,
}

/// Who uses a type, which decides how it is written.
#[derive(Clone, Copy)]
pub(super) struct Use<'a> {
    pub(super) plan: &'a Plan<'a>,
    pub(super) scope: Scope,
    /// The type whose values contain the used ones; none for arguments and results.
    pub(super) user: Option<DefId>,
}

impl Use<'_> {
    /// The name of a type of the schema.
    pub(super) fn name(&self, id: DefId) -> TokenStream {
        let name = self.plan.name(id);
        match self.scope {
            Scope::Types => quote!(#name),
            Scope::Inner => quote!(types::#name),
        }
    }

    pub(super) fn is_boxed(&self, used: DefId) -> bool {
        self.user.is_some_and(|user| self.plan.is_boxed(user, used))
    }

    /// The Rust type.
    pub(super) fn ty(&self, ty: &Type) -> TokenStream {
        match ty {
            Type::Builtin(builtin) => builtin_type(*builtin),
            Type::Defined(id) if self.is_boxed(*id) => {
                let name = self.name(*id);
                quote!(Box<#name>)
            }
            Type::Defined(id) => self.name(*id),
            Type::Array(element) => {
                let element = self.ty(element);
                quote!(Vec<#element>)
            }
        }
    }

    /// A `fn(Value, &Path) -> Decoded<T>`.
    pub(super) fn decoder(&self, ty: &Type) -> TokenStream {
        match ty {
            Type::Builtin(builtin) => {
                let name = builtin_decoder(*builtin);
                quote!(decode::#name)
            }
            Type::Defined(id) => {
                let name = self.name(*id);
                if self.is_boxed(*id) {
                    quote!(|value, at| #name::decode(value, at).map(Box::new))
                } else {
                    quote!(#name::decode)
                }
            }
            Type::Array(element) => {
                let element = self.decoder(element);
                quote!(|value, at| decode::list(value, at, #element))
            }
        }
    }

    /// A `fn(T) -> Value`.
    pub(super) fn encoder(&self, ty: &Type) -> TokenStream {
        match ty {
            Type::Builtin(Builtin::Null) => quote!(encode::null),
            Type::Builtin(Builtin::Any) => quote!(encode::any),
            Type::Builtin(Builtin::QType) => quote!(QType::into_value),
            Type::Builtin(_) => quote!(encode::plain),
            Type::Defined(id) if self.is_boxed(*id) => quote!(|value| value.into_value()),
            Type::Defined(id) => {
                let name = self.name(*id);
                quote!(#name::into_value)
            }
            Type::Array(element) => {
                let element = self.encoder(element);
                quote!(|values| encode::list(values, #element))
            }
        }
    }

    /// `value` in its wire form.
    pub(super) fn encoded(&self, ty: &Type, value: &TokenStream) -> TokenStream {
        match ty {
            Type::Defined(_) | Type::Builtin(Builtin::QType) => quote!(#value.into_value()),
            Type::Array(element) => {
                let element = self.encoder(element);
                quote!(encode::list(#value, #element))
            }
            Type::Builtin(_) => {
                let encoder = self.encoder(ty);
                quote!(#encoder(#value))
            }
        }
    }

    /// The type of a member's field.
    pub(super) fn member_type(&self, member: &Member) -> TokenStream {
        let ty = self.ty(&member.ty);
        if member.optional {
            quote!(Option<#ty>)
        } else {
            ty
        }
    }

    /// The call that takes a member out of `from`.
    pub(super) fn take(&self, from: &Ident, member: &Member) -> TokenStream {
        let method = if member.optional {
            format_ident!("optional")
        } else {
            format_ident!("required")
        };
        let name = &member.name;
        let decoder = self.decoder(&member.ty);
        quote!(#from.#method(#name, #decoder)?)
    }

    /// The statement that puts a member of `self` into `object`.
    pub(super) fn put(&self, member: &Member) -> TokenStream {
        let name = &member.name;
        let field = snake_name(&member.name);
        if member.optional {
            let encoder = self.encoder(&member.ty);
            quote!(encode::optional(object, #name, self.#field.map(#encoder));)
        } else {
            let value = self.encoded(&member.ty, &quote!(self.#field));
            quote!(encode::member(object, #name, #value);)
        }
    }

    /// The fields of a struct.
    pub(super) fn fields(&self, members: &[&Member]) -> TokenStream {
        members
            .iter()
            .map(|member| {
                let doc = rustdoc::member(member);
                let field = snake_name(&member.name);
                let ty = self.member_type(member);
                quote!(#doc pub #field: #ty,)
            })
            .collect()
    }

    /// A whole struct with its codec.
    pub(super) fn structure(
        &self,
        name: &Ident,
        doc: &TokenStream,
        members: &[&Member],
    ) -> TokenStream {
        let fields = self.fields(members);
        let from = if members.is_empty() {
            format_ident!("_members")
        } else {
            format_ident!("members")
        };
        let into = if members.is_empty() {
            format_ident!("_object")
        } else {
            format_ident!("object")
        };
        let taken = members.iter().map(|member| {
            let field = snake_name(&member.name);
            let take = self.take(&from, member);
            quote!(#field: #take,)
        });
        let put = members.iter().map(|member| self.put(member));
        let whole = whole_object();
        quote! {
            #doc
            #[derive(Debug, Clone, PartialEq)]
            pub struct #name { #fields }

            impl #name {
                #whole

                /// Takes the members of this type out of an object that may have others.
                pub fn decode_members(#from: &mut Members<'_>) -> Decoded<Self> {
                    Ok(Self { #(#taken)* })
                }

                /// Adds the members of this type to an object.
                pub fn encode_members(self, #into: &mut Object) {
                    #(#put)*
                }
            }
        }
    }
}

/// `decode` and `into_value` of an object type, by its members.
pub(super) fn whole_object() -> TokenStream {
    quote! {
        /// Decodes a value that stands at `at`: an object with these members and no others.
        pub fn decode(value: Value, at: &Path<'_>) -> Decoded<Self> {
            let mut members = Members::open(value, at)?;
            let decoded = Self::decode_members(&mut members)?;
            members.finish()?;
            Ok(decoded)
        }

        /// The wire form.
        pub fn into_value(self) -> Value {
            let mut object = Object::new();
            self.encode_members(&mut object);
            Value::Object(object)
        }
    }
}

fn builtin_type(builtin: Builtin) -> TokenStream {
    match builtin {
        Builtin::Str => quote!(String),
        Builtin::Int | Builtin::Int64 => quote!(i64),
        Builtin::Int8 => quote!(i8),
        Builtin::Int16 => quote!(i16),
        Builtin::Int32 => quote!(i32),
        Builtin::Uint8 => quote!(u8),
        Builtin::Uint16 => quote!(u16),
        Builtin::Uint32 => quote!(u32),
        Builtin::Uint64 | Builtin::Size => quote!(u64),
        Builtin::Number => quote!(f64),
        Builtin::Bool => quote!(bool),
        Builtin::Null => quote!(()),
        Builtin::Any => quote!(Value),
        Builtin::QType => quote!(QType),
    }
}

fn builtin_decoder(builtin: Builtin) -> Ident {
    let name = match builtin {
        Builtin::Str => "string",
        Builtin::Int | Builtin::Int64 => "int64",
        Builtin::Int8 => "int8",
        Builtin::Int16 => "int16",
        Builtin::Int32 => "int32",
        Builtin::Uint8 => "uint8",
        Builtin::Uint16 => "uint16",
        Builtin::Uint32 => "uint32",
        Builtin::Uint64 => "uint64",
        Builtin::Size => "size",
        Builtin::Number => "number",
        Builtin::Bool => "boolean",
        Builtin::Null => "null",
        Builtin::Any => "any",
        Builtin::QType => "qtype",
    };
    format_ident!("{name}")
}
