"""What a language model says of response tokens, without computing what nobody asks for."""
