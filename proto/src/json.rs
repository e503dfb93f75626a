//! What the generated code needs for JSON in the form that Protobuf defines.

use std::fmt;
use std::marker::PhantomData;

use serde::de::{Error, Visitor};
use serde::{Deserializer, Serializer};

use crate::v1;

/// Whether a field may be left out.
pub(crate) fn is_default<T: Default + PartialEq>(value: &T) -> bool {
    *value == T::default()
}

/// An enum by the names of its values; a value that has none is a number.
pub(crate) struct ByName<E>(PhantomData<E>);

/// An enum of the contract.
pub(crate) trait Named: TryFrom<i32> + Into<i32> {
    /// As the `.proto` has it.
    fn name(&self) -> &'static str;
    /// The value of this name.
    fn of(name: &str) -> Option<Self>;
}

macro_rules! named {
    ($($name:ident),*) => {
        $(impl Named for v1::$name {
            fn name(&self) -> &'static str {
                self.as_str_name()
            }

            fn of(name: &str) -> Option<Self> {
                Self::from_str_name(name)
            }
        })*
    };
}

named!(ChatFormat, HhhPrompt, Truncation, Objective, Priority);

impl<E: Named> ByName<E> {
    pub(crate) fn serialize<S: Serializer>(value: &i32, serializer: S) -> Result<S::Ok, S::Error> {
        match E::try_from(*value) {
            Ok(known) => serializer.serialize_str(known.name()),
            Err(_) => serializer.serialize_i32(*value),
        }
    }

    pub(crate) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<i32, D::Error> {
        deserializer.deserialize_any(Self(PhantomData))
    }
}

impl<E: Named> Visitor<'_> for ByName<E> {
    type Value = i32;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("the name of a value, or its number")
    }

    fn visit_str<X: Error>(self, name: &str) -> Result<i32, X> {
        E::of(name).map(Into::into).ok_or_else(|| X::custom(format!("{name} is no value of this field")))
    }

    fn visit_i64<X: Error>(self, value: i64) -> Result<i32, X> {
        i32::try_from(value).map_err(X::custom)
    }

    fn visit_u64<X: Error>(self, value: u64) -> Result<i32, X> {
        i32::try_from(value).map_err(X::custom)
    }
}
