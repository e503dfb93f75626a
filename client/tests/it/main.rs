//! The client and the command against a server in this process that does what a test tells it to.

#[cfg(test)]
mod bulk;
#[cfg(test)]
mod command;
#[cfg(test)]
mod fake;
#[cfg(test)]
mod library;
