//! Messages with a name server, as far as they are the same by all sockets (RFC 1035 section 4.2).

use std::io;

use rustix::net::{RecvFlags, recv};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpStream, UdpSocket};

/// The datagram that has come, if one has. A buffer for the largest there can be is not kept for
/// each question.
pub(in crate::network) fn datagram(socket: &UdpSocket) -> io::Result<Vec<u8>> {
    let mut buffer = [0; u16::MAX as usize];
    let (length, _) = recv(socket, &mut buffer[..], RecvFlags::DONTWAIT)?;
    Ok(buffer[..length].to_vec())
}

/// Asks one question over a stream.
pub(in crate::network) async fn by_stream(
    mut stream: TcpStream,
    question: &[u8],
) -> io::Result<Vec<u8>> {
    let length = u16::try_from(question.len()).map_err(io::Error::other)?;
    stream.write_all(&length.to_be_bytes()).await?;
    stream.write_all(question).await?;
    let mut answer = vec![0; stream.read_u16().await?.into()];
    stream.read_exact(&mut answer).await?;
    Ok(answer)
}
