//! Bodies, over plain HTTP, to a server in this process.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::TcpStream;
use std::sync::{Mutex, PoisonError};

use serde_json::Value;

use crate::Target;
use crate::request::WIRE;

/// A byte for the route, then a body. The server reads it, cuts it into calls, and computes and answers them.
pub const GATEWAY: Target = Target { name: "gateway", take, fixed: 64 << 20, per_byte: 4096 };

const ROUTES: [&str; 7] = ["/get_reward", "/score", "/classify", "/pooling", "/rerank", "/v2/rerank", "/v1/embeddings"];
/// More items than this has room for are more calls of eight, which take their time and say nothing new.
const MAX_BODY: usize = 4096;

/// Kept from one input to the next: a machine has only so many ports.
static CONNECTION: Mutex<Option<BufReader<TcpStream>>> = Mutex::new(None);

fn take(data: &[u8]) {
    let Some((first, body)) = data.split_first() else { return };
    if body.len() > MAX_BODY {
        return;
    }
    let route = ROUTES[usize::from(*first) % ROUTES.len()];
    let (status, answer) = post(route, body);
    let answer: Value = serde_json::from_slice(&answer).expect("JSON is answered");
    // A body can be wrong, and there may be too much in it: none of that is an error of the server's.
    let error = &answer["error"];
    let good = match status {
        200 => error.is_null(),
        400 | 404 | 413 => error["code"] == status,
        _ => error["type"] == "RESOURCE_EXHAUSTED",
    };
    assert!(good, "{route}: {status} {answer}");
}

/// Sends a body and answers the status and the body that come back.
fn post(route: &str, body: &[u8]) -> (u16, Vec<u8>) {
    let mut kept = CONNECTION.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(connection) = &mut *kept
        && let Ok(answer) = ask(connection, route, body)
    {
        return answer;
    }
    // The first one, or the server has closed it.
    let mut connection = BufReader::new(TcpStream::connect(WIRE.http).expect("a connection"));
    let answer = ask(&mut connection, route, body).expect("an answer");
    *kept = Some(connection);
    answer
}

fn ask(connection: &mut BufReader<TcpStream>, route: &str, body: &[u8]) -> io::Result<(u16, Vec<u8>)> {
    let length = body.len();
    let head = format!(
        "POST {route} HTTP/1.1\r\nhost: plumb\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    );
    connection.get_mut().write_all(&[head.as_bytes(), body].concat())?;
    let mut line = String::new();
    connection.read_line(&mut line)?;
    let wrong = || io::Error::new(io::ErrorKind::InvalidData, "no answer of HTTP");
    let status = line.split(' ').nth(1).and_then(|code| code.parse().ok()).ok_or_else(wrong)?;
    let mut length = 0;
    loop {
        line.clear();
        connection.read_line(&mut line)?;
        match line.trim_end().split_once(": ") {
            Some((name, value)) if name.eq_ignore_ascii_case("content-length") => {
                length = value.parse().map_err(|_| wrong())?;
            }
            Some(_) => {}
            None => break,
        }
    }
    let mut answer = vec![0; length];
    connection.read_exact(&mut answer)?;
    Ok((status, answer))
}
