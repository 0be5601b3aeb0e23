package dispatch

// unread is what a reply has for its reader. Of a stream it holds copies, one behind the other,
// in memory that it uses over and over: a payload comes as a part of a message that others have
// payloads in, too, and a token should leave no garbage.
type unread struct {
	lines [][]byte
	size  int    // of lines, in bytes
	text  []byte // where the last of lines are
	// handed is what the reader has, until it asks for more.
	handed struct {
		lines [][]byte
		text  []byte
	}
}

const (
	// minText and maxText bound the memory that is taken for copies at once, in bytes, but for
	// one that is larger. What has grown beyond maxText, or maxLines, isn't used again.
	minText  = 256
	maxText  = 4 << 10
	maxLines = 16
)

// add adds a payload, which has to stay as it is.
func (u *unread) add(payload []byte) {
	u.lines = append(u.lines, payload)
	u.size += len(payload)
}

// copy adds a copy of a payload.
func (u *unread) copy(payload []byte) {
	if cap(u.text)-len(u.text) < len(payload) {
		// The lines before stay where they are.
		u.text = make([]byte, 0, max(len(payload), min(2*cap(u.text), maxText), minText))
	}
	start := len(u.text)
	u.text = append(u.text, payload...)
	u.add(u.text[start:len(u.text):len(u.text)])
}

// hand takes all lines. They are good until back or hand is called.
func (u *unread) hand() [][]byte {
	lines, text := u.lines, u.text
	u.lines, u.text = u.handed.lines, u.handed.text
	u.handed.lines, u.handed.text = lines, text
	u.reuse()
	u.size = 0
	return lines
}

// back says that the reader is done with what it has, so that one that keeps up needs no
// second memory.
func (u *unread) back() {
	if u.handed.lines == nil || len(u.lines) > 0 {
		return
	}
	u.lines, u.text = u.handed.lines, u.handed.text
	u.handed.lines, u.handed.text = nil, nil
	u.reuse()
}

// reuse empties memory that nobody reads any more.
func (u *unread) reuse() {
	clear(u.lines)
	if u.lines = u.lines[:0]; cap(u.lines) > maxLines {
		u.lines = nil
	}
	if u.text = u.text[:0]; cap(u.text) > maxText {
		u.text = nil
	}
}

// drop forgets all lines.
func (u *unread) drop() { *u = unread{handed: u.handed} }
