package load

// Breach is a way in which a reply isn't whole, though the API calls it a success.
type Breach string

// The breaches. Torn is found in every reply; the others need numbered tokens.
const (
	// Torn: the reply ended without finish_reason (with numbered tokens, or without [DONE]),
	// and without an error that says so, or its connection was cut. SDKs take the first for
	// complete.
	Torn Breach = "torn"
	// Lost: tokens are missing between two others.
	Lost Breach = "lost"
	// Repeated: a token came again, or after one that it belongs before.
	Repeated Breach = "repeated"
	// Short: the reply ended as if complete, but its last tokens are missing; Long: there
	// are more than were asked for.
	Short Breach = "short"
	Long  Breach = "long"
	// Garbled: there is something that isn't a numbered token.
	Garbled Breach = "garbled"
)

// numbers checks that a text is " 0 1 2 …", piece by piece. The zero value checks nothing.
type numbers struct {
	want   int // how many; 0: don't check
	next   int // the number that is due
	value  int // of the number that is being read
	digits int // that were read of it
	open   bool
	breach Breach // the first that was found
}

// take takes a piece: the inside of a JSON string, up to its closing quote or further.
func (n *numbers) take(text []byte) {
	if n.want == 0 || n.breach != "" {
		return
	}
	for _, c := range text {
		switch {
		case c == '"':
			return
		case c == ' ':
			n.close()
			n.open = true
		case c >= '0' && c <= '9' && n.open && n.digits < 9:
			n.value, n.digits = n.value*10+int(c-'0'), n.digits+1
		default:
			n.breach = Garbled
		}
		if n.breach != "" {
			return
		}
	}
}

// close ends a number.
func (n *numbers) close() {
	if !n.open {
		return
	}
	switch {
	case n.digits == 0:
		n.breach = Garbled
	case n.value > n.next:
		n.breach = Lost
	case n.value < n.next:
		n.breach = Repeated
	}
	n.next++
	n.value, n.digits, n.open = 0, 0, false
}

// end ends the text, and returns what is wrong with it.
func (n *numbers) end() Breach {
	if n.want == 0 || n.breach != "" {
		return n.breach
	}
	n.close()
	switch {
	case n.breach != "":
	case n.next < n.want:
		n.breach = Short
	case n.next > n.want:
		n.breach = Long
	}
	return n.breach
}

// check returns what is wrong with a reply that seems to be a success.
func (r *reply) check() Breach {
	complete := r.finished && (r.done || r.numbers.want == 0)
	if breach := r.numbers.end(); breach != "" && (breach != Short || complete) {
		return breach
	}
	if !complete {
		return Torn
	}
	return ""
}
